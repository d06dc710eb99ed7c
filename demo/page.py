"""The page: its layout, its wiring, and its words in two languages. What the controls do is in `talk.py`."""

from pathlib import Path
from types import SimpleNamespace

import gradio as gr

from visualrwkv.configuration import POSITIONS, SCANS
from visualrwkv.demo import panel
from visualrwkv.demo.models import EMBEDDED
from visualrwkv.demo.talk import Talk
from visualrwkv.demo.texts import LANGUAGES, language_of, text
from visualrwkv.demo.view import tell

SCRIPT = Path(__file__).with_name("page.js")
KEEP_FILES = 3600  # seconds until an uploaded file that no session uses is deleted


class Words:
    """The texts of the page, and what of each component changes with the language."""

    def __init__(self, language: str):
        self.language = language
        self._translated = []  # (component, {property: key of a text, or function of the language})

    def __call__(self, key: str) -> str:
        return text(self.language, key)

    def of(self, component, **keys):
        """Returns the component, whose properties are translated from now on."""
        self._translated.append((component, keys))
        return component

    @property
    def components(self) -> list:
        return [component for component, _ in self._translated]

    def updates(self, language: str) -> list:
        """For each of `components` its texts in a language."""
        return [
            gr.update(**{name: key(language) if callable(key) else text(language, key) for name, key in keys.items()})
            for _, keys in self._translated
        ]


def build(talk: Talk) -> gr.Blocks:
    """The page."""
    words = Words("en")
    with gr.Blocks(
        title="VisualRWKV", analytics_enabled=False, delete_cache=(600, KEEP_FILES), fill_width=True
    ) as page:
        with gr.Row(elem_id="head"):
            words.of(gr.HTML(_brand(words.language), elem_id="brand"), value=_brand)
            language = gr.Radio(
                list(LANGUAGES.items()),
                value=words.language,
                label="Language 语言",
                show_label=False,
                container=False,
                elem_id="language",
                min_width=150,
            )
        with gr.Row(elem_id="main"):
            with gr.Column(scale=3, min_width=320, elem_id="talk"):
                middle = _middle(words, talk)
            with gr.Column(scale=1, min_width=300, elem_id="side"):
                side = _side(words, talk)
        _connect(page, talk, words, SimpleNamespace(language=language, **middle, **side))
    return page


def _middle(words, talk) -> dict:
    """The conversation, the examples and the box to write in."""
    chatbot = gr.Chatbot(
        container=False,
        elem_id="chat",
        height=None,
        render_markdown=False,  # words are shown as they were written, by anybody
        latex_delimiters=[],
        allow_tags=False,
        buttons=[],
        feedback_options=None,
        placeholder=_welcome(talk.models)(words.language),
        allow_file_downloads=False,
        autoscroll=False,  # page.js follows a reply, unless its reader has scrolled up
    )
    words.of(chatbot, placeholder=_welcome(talk.models))
    gallery = gr.Gallery(
        _captioned(talk.examples)(words.language),
        columns=4,
        rows=1,
        height="auto",
        container=False,
        allow_preview=False,
        buttons=[],
        object_fit="contain",
        interactive=False,
        elem_id="examples",
    )
    words.of(gallery, value=_captioned(talk.examples))
    viewfinder = gr.Image(
        sources=["webcam"],
        type="filepath",
        format="png",
        show_label=False,
        visible=False,
        webcam_options=gr.WebcamOptions(mirror=False),
        buttons=[],
        elem_id="viewfinder",
    )
    box = gr.MultimodalTextbox(
        placeholder=words("ask"),
        container=False,
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=1_000_000,  # a longer text would become a file; `say` has the limit
        max_lines=6,
        elem_id="box",
        autofocus=True,
    )
    words.of(box, placeholder="ask")
    with gr.Row(elem_id="actions"):
        buttons = _buttons(words, "new", "retry", "undo", "edit", "camera")
    return {"chatbot": chatbot, "gallery": gallery, "viewfinder": viewfinder, "box": box, **buttons}


def _side(words, talk) -> dict:
    """The panel: what the conversation costs, keeping it, and the settings."""
    numbers = panel.figures(talk.models.get(talk.models.default[0]))
    figures = gr.HTML(panel.html(numbers, words.language), elem_id="figures")
    with gr.Row(elem_id="keep"):
        buttons = _buttons(words, "save", "fork")
        upload = gr.UploadButton(words("load"), size="sm", file_types=[".safetensors"], elem_id="load", min_width=60)
        words.of(upload, label="load")
    branches = gr.Radio([], label=words("branch"), visible=False, elem_id="branches")
    words.of(branches, label="branch")
    download = gr.DownloadButton(visible="hidden")  # its file is fetched by a script at once
    with words.of(gr.Accordion(words("reading"), open=False, elem_id="reading"), label="reading"):
        reading = _reading(words, talk.models)
    with words.of(gr.Accordion(words("sampling"), open=False, elem_id="sampling"), label="sampling"):
        sampling = _sampling(words, talk.limits)
    parts = {"figures": figures, "upload": upload, "branches": branches, "download": download}
    return parts | buttons | {"reading": reading, "sampling": sampling}


def _connect(page, talk, words, parts):
    """What happens when something is pressed."""
    again = gr.State()  # a message to be answered again
    camera_open = gr.State(False)
    name = gr.Textbox(visible="hidden")  # of the page, for page.js
    refuse = gr.Button(visible="hidden", elem_id="refuse")  # pressed by page.js
    setting = [parts.language, *parts.reading]
    outputs = [parts.chatbot, parts.box, parts.figures, parts.branches]
    private = {"api_visibility": "private", "show_progress": "hidden"}
    light = {**private, "concurrency_limit": 8, "concurrency_id": "light"}
    reply = {
        "inputs": [parts.box, *setting, *parts.sampling],
        "outputs": outputs,
        "show_progress": "hidden",
        "concurrency_limit": talk.limits.replies,
        "concurrency_id": "reply",
    }
    parts.box.submit(talk.queued, [parts.language], None, **light)
    sent = parts.box.submit(talk.say, **reply, api_name="say")
    parts.box.stop(talk.stop, **private, queue=False)
    of_a_draft = reply | {"inputs": [again, *setting, *parts.sampling], "api_visibility": "private"}
    picked = parts.gallery.select(talk.example, [parts.language], [again], **light).then(talk.say, **of_a_draft)
    retried = parts.retry.click(talk.take_back, setting, [*outputs, again], **light).then(talk.say, **of_a_draft)
    for written in (sent, picked, retried):
        # Gradio sends the end of a reply twice, the second time over what was pressed meanwhile
        written.then(talk.show, setting, outputs, **light)
    gr.on([parts.new.click, parts.chatbot.clear], talk.new, setting, outputs, **light)
    parts.undo.click(talk.undo, setting, outputs, **light)
    parts.edit.click(talk.edit, [parts.box, *setting], outputs, **light)
    parts.fork.click(talk.fork, setting, outputs, **light)
    parts.branches.input(talk.switch, [parts.branches, *setting], outputs, **light)
    for control in parts.reading:
        control.input(talk.setting, setting, [*outputs, *parts.reading], **light)
    saved = parts.save.click(talk.save, [parts.language], [parts.download], **light)
    saved.then(None, [parts.download], None, js=_DOWNLOAD)
    parts.upload.upload(talk.load, [parts.upload, *setting], [*outputs, *parts.reading], **light)
    parts.camera.click(talk.open_camera, [camera_open], [parts.viewfinder, camera_open], **light)
    parts.viewfinder.input(
        talk.attach, [parts.box, parts.viewfinder], [parts.box, parts.viewfinder, camera_open], **light
    )
    refuse.click(lambda language: tell(language, text(language, "refused")), [parts.language], None, **light)

    def arrive(chosen, former, request: gr.Request):
        spoken = chosen or language_of(request.headers.get("accept-language"))
        return spoken, request.session_hash, *talk.arrive(former, spoken, request)

    page.load(None, None, None, js=SCRIPT.read_text(encoding="utf-8"))
    arrived = page.load(
        arrive,
        [parts.language, name],
        [parts.language, name, *outputs, *parts.reading],
        js="() => [window.visualrwkv.language(), window.visualrwkv.former()]",
        **light,
    )
    arrived.then(None, [name], None, js="name => window.visualrwkv.remember(name)")
    for event in (arrived.then, parts.language.change):
        event(None, [parts.language], None, js="language => { document.documentElement.lang = language; }")
    parts.language.input(None, [parts.language], None, js="language => window.visualrwkv.choose(language)")
    translated = parts.language.change(words.updates, [parts.language], words.components, **light)
    translated.then(talk.show, setting, outputs, **light)
    page.unload(talk.leave)


_DOWNLOAD = """(file) => {
    if (!file) return;
    const link = Object.assign(document.createElement("a"), {href: file.url, download: file.orig_name});
    document.body.appendChild(link).click();
    link.remove();
}"""


def _brand(language):
    name = f'<h1 data-picture="{text(language, "picture")}">Visual<span>RWKV</span></h1>'  # with a word for page.js
    return f"{name}<p>{text(language, 'tagline')}</p>"


def _welcome(models):
    keys = ["welcome"] + ["welcome_embedded"] * (models.default[0] == EMBEDDED)
    return lambda language: f'<div class="welcome">{"".join(f"<p>{text(language, key)}</p>" for key in keys)}</div>'


def _captioned(drawn):
    return lambda language: [(example.picture, example.questions[language]) for example in drawn]


def _buttons(words, *keys):
    return {key: words.of(gr.Button(words(key), size="sm", elem_id=key, min_width=60), value=key) for key in keys}


def _reading(words, models):
    """Controls of the model and the way of reading; a change begins a new conversation."""
    model, prompt, scan = models.default
    picker = gr.Dropdown(models.choices(words.language), value=model, label=words("model"), elem_id="model")
    words.of(picker, label="model", choices=models.choices)
    ways = []
    for key, names, value in (("prompt", POSITIONS, prompt), ("scan", SCANS, scan)):
        choices = _choices(key, names)
        ways.append(gr.Radio(choices(words.language), value=value, label=words(key)))
        words.of(ways[-1], label=key, choices=choices)
    words.of(gr.HTML(_reading_note(words.language)), value=_reading_note)
    return [picker, *ways]


def _choices(key, names):
    return lambda language: [(text(language, f"{key}_{name}"), name) for name in names]


def _reading_note(language):
    return f'<p class="hint">{text(language, "reading_note")}</p>'


def _sampling(words, limits):
    """Controls of how a reply is written, in the order in which `Talk.say` takes them."""

    def slider(key, low, high, value, step):
        return words.of(gr.Slider(low, high, value=value, step=step, label=words(key), elem_id=key), label=key)

    return [
        words.of(gr.Checkbox(False, label=words("look_again"), container=False), label="look_again"),
        slider("max_new_tokens", 1, limits.new_tokens, 256, 1),
        slider("temperature", 0, 2, 0, 0.05),
        slider("top_p", 0.05, 1, 1, 0.05),
        slider("top_k", 0, 200, 0, 1),
        # a number field would show 0 where it is empty
        words.of(gr.Textbox("", max_lines=1, label=words("seed"), elem_id="seed"), label="seed"),
        slider("presence_penalty", 0, 2, 0, 0.05),
        slider("frequency_penalty", 0, 2, 0, 0.05),
        slider("penalty_decay", 0.9, 1, 0.996, 0.001),
        words.of(gr.Textbox("", lines=2, max_lines=4, label=words("stop")), label="stop"),
    ]
