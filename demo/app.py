"""The Gradio app: a chat about pictures. This file is its layout and its wiring; `talk.py` is what it does.

Safe by default: it listens on this machine alone, shares nothing, fetches no addresses, and shows no file but those
that the app itself made in a folder of its own, which goes when the server stops.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from visualrwkv import InputError
from visualrwkv.addresses import bind, in_address, is_local
from visualrwkv.configuration import POSITIONS, SCANS
from visualrwkv.demo import examples, panel
from visualrwkv.demo.guard import Guard
from visualrwkv.demo.models import EMBEDDED, Models
from visualrwkv.demo.sessions import Sessions
from visualrwkv.demo.talk import Limits, Talk
from visualrwkv.demo.texts import LANGUAGES, language_of, text
from visualrwkv.errors import one_line

STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("page.js")
KEEP_FILES = 3600  # seconds until an uploaded file that no session uses is deleted
THEME = gr.themes.Base(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    radius_size="lg",
    font=["system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "monospace"],
).set(
    body_text_color_subdued="*neutral_500",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)


def build(talk: Talk) -> gr.Blocks:
    """The page."""
    start = "en"
    translated = []  # (component, {property: key of a text, or function of the language})

    def say_in(component, **keys):
        translated.append((component, keys))
        return component

    def t(key):
        return text(start, key)

    model, prompt, scan = talk.models.default

    def placeholder(language):
        words = [text(language, "welcome")] + [text(language, "welcome_embedded")] * (model == EMBEDDED)
        return f'<div class="welcome">{"".join(f"<p>{word}</p>" for word in words)}</div>'

    with gr.Blocks(
        title="VisualRWKV", analytics_enabled=False, delete_cache=(600, KEEP_FILES), fill_width=True
    ) as page:
        with gr.Row(elem_id="head"):
            say_in(gr.HTML(_brand(start), elem_id="brand"), value=_brand)
            language = gr.Radio(
                list(LANGUAGES.items()), value=start, container=False, elem_id="language", min_width=150
            )
        with gr.Row(elem_id="main"):
            with gr.Column(scale=3, min_width=320, elem_id="talk"):
                chatbot = gr.Chatbot(
                    container=False,
                    elem_id="chat",
                    height=None,
                    render_markdown=False,  # words are shown as they were written, by anybody
                    latex_delimiters=[],
                    allow_tags=False,
                    buttons=[],
                    feedback_options=None,
                    placeholder=placeholder(start),
                    allow_file_downloads=False,
                    autoscroll=False,  # page.js follows a reply, unless its reader has scrolled up
                )
                say_in(chatbot, placeholder=placeholder)
                gallery = gr.Gallery(
                    _captioned(talk.examples, start),
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
                say_in(gallery, value=lambda language: _captioned(talk.examples, language))
                camera = gr.Image(
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
                    placeholder=t("ask"),
                    container=False,
                    file_types=["image"],
                    file_count="multiple",
                    max_plain_text_length=1_000_000,  # a longer text would become a file; `say` has the limit
                    max_lines=6,
                    elem_id="box",
                    autofocus=True,
                )
                say_in(box, placeholder="ask")
                with gr.Row(elem_id="actions"):
                    new, retry, undo, edit, photograph = (
                        say_in(gr.Button(t(key), size="sm", elem_id=key, min_width=60), value=key)
                        for key in ("new", "retry", "undo", "edit", "camera")
                    )
            with gr.Column(scale=1, min_width=300, elem_id="side"):
                numbers = panel.figures(talk.models.get(model))
                figures = gr.HTML(panel.html(numbers, start), elem_id="figures")
                with gr.Row(elem_id="keep"):
                    save, fork = (
                        say_in(gr.Button(t(key), size="sm", elem_id=key, min_width=60), value=key)
                        for key in ("save", "fork")
                    )
                    upload = gr.UploadButton(
                        t("load"), size="sm", file_types=[".safetensors"], elem_id="load", min_width=60
                    )
                    say_in(upload, label="load")
                branches = gr.Radio([], label=t("branch"), visible=False, elem_id="branches")
                say_in(branches, label="branch")
                download = gr.DownloadButton(visible="hidden")  # its file is fetched by a script at once
                with say_in(gr.Accordion(t("reading"), open=False, elem_id="reading"), label="reading"):
                    reading = _reading(say_in, talk.models, start)
                with say_in(gr.Accordion(t("sampling"), open=False, elem_id="sampling"), label="sampling"):
                    sampling = _sampling(say_in, talk.limits, start)

        again = gr.State()  # a message to be answered again
        camera_open = gr.State(False)
        name = gr.Textbox(visible="hidden")  # of the page, for page.js
        setting = [language, *reading]
        outputs = [chatbot, box, figures, branches]
        private = {"api_visibility": "private", "show_progress": "hidden"}
        light = {**private, "concurrency_limit": 8, "concurrency_id": "light"}
        reply = {
            "inputs": [box, *setting, *sampling],
            "outputs": outputs,
            "show_progress": "hidden",
            "concurrency_limit": talk.limits.replies,
            "concurrency_id": "reply",
        }
        box.submit(talk.queued, [language], None, **light)
        sent = box.submit(talk.say, **reply, api_name="say")
        box.stop(talk.stop, **private, queue=False)
        of_a_draft = reply | {"inputs": [again, *setting, *sampling], "api_visibility": "private"}
        picked = gallery.select(talk.example, [language], [again], **light).then(talk.say, **of_a_draft)
        retried = retry.click(talk.take_back, setting, [*outputs, again], **light).then(talk.say, **of_a_draft)
        for written in (sent, picked, retried):
            # Gradio sends the end of a reply twice, the second time over what was pressed meanwhile
            written.then(talk.show, setting, outputs, **light)
        gr.on([new.click, chatbot.clear], talk.new, setting, outputs, **light)
        undo.click(talk.undo, setting, outputs, **light)
        edit.click(talk.edit, [box, *setting], outputs, **light)
        fork.click(talk.fork, setting, outputs, **light)
        branches.input(talk.switch, [branches, *setting], outputs, **light)
        for control in reading:
            control.input(talk.setting, setting, [*outputs, *reading], **light)
        save.click(talk.save, [language], [download], **light).then(None, [download], None, js=_DOWNLOAD)
        upload.upload(talk.load, [upload, *setting], [*outputs, *reading], **light)
        photograph.click(talk.open_camera, [camera_open], [camera, camera_open], **light)
        camera.input(talk.attach, [box, camera], [box, camera, camera_open], **light)

        def translate(language):
            return [_in_language(keys, language) for _, keys in translated]

        def arrive(chosen, former, request: gr.Request):
            spoken = chosen or language_of(request.headers.get("accept-language"))
            return spoken, request.session_hash, *talk.arrive(former, spoken, request)

        spoken = [component for component, _ in translated]
        page.load(None, None, None, js=SCRIPT.read_text(encoding="utf-8"))
        arrived = page.load(
            arrive,
            [language, name],
            [language, name, *outputs, *reading],
            js="() => [window.visualrwkv.language(), window.visualrwkv.former()]",
            **light,
        )
        arrived.then(None, [name], None, js="name => window.visualrwkv.remember(name)")
        for event in (arrived.then, language.change):
            event(None, [language], None, js="language => { document.documentElement.lang = language; }")
        language.input(None, [language], None, js="language => window.visualrwkv.choose(language)")
        language.change(translate, [language], spoken, **light).then(talk.show, setting, outputs, **light)
        page.unload(talk.leave)
    return page


_DOWNLOAD = """(file) => {
    if (!file) return;
    const link = Object.assign(document.createElement("a"), {href: file.url, download: file.orig_name});
    document.body.appendChild(link).click();
    link.remove();
}"""


def _in_language(keys, language):
    return gr.update(**{name: key(language) if callable(key) else text(language, key) for name, key in keys.items()})


def _brand(language):
    return f"<h1>Visual<span>RWKV</span></h1><p>{text(language, 'tagline')}</p>"


def _captioned(drawn, language):
    return [(example.picture, example.questions[language]) for example in drawn]


def _reading(say_in, models, start):
    """Controls of the model and the way of reading; a change begins a new conversation."""
    model, prompt, scan = models.default
    picker = gr.Dropdown(models.choices(start), value=model, label=text(start, "model"), elem_id="model")
    say_in(picker, label="model", choices=models.choices)
    place = gr.Radio(value=prompt, label=text(start, "prompt"), choices=_choices("prompt", POSITIONS)(start))
    say_in(place, label="prompt", choices=_choices("prompt", POSITIONS))
    order = gr.Radio(value=scan, label=text(start, "scan"), choices=_choices("scan", SCANS)(start))
    say_in(order, label="scan", choices=_choices("scan", SCANS))
    say_in(gr.HTML(f'<p class="hint">{text(start, "reading_note")}</p>'),
           value=lambda language: f'<p class="hint">{text(language, "reading_note")}</p>')  # fmt: skip
    return [picker, place, order]


def _choices(key, names):
    return lambda language: [(text(language, f"{key}_{name}"), name) for name in names]


def _sampling(say_in, limits, start):
    """Controls of how a reply is written, in the order in which `Talk.say` takes them."""

    def slider(key, low, high, value, step):
        return say_in(gr.Slider(low, high, value=value, step=step, label=text(start, key), elem_id=key), label=key)

    return [
        say_in(gr.Checkbox(False, label=text(start, "look_again"), container=False), label="look_again"),
        slider("max_new_tokens", 1, limits.new_tokens, 256, 1),
        slider("temperature", 0, 2, 0, 0.05),
        slider("top_p", 0.05, 1, 1, 0.05),
        slider("top_k", 0, 200, 0, 1),
        # a number field would show 0 where it is empty
        say_in(gr.Textbox("", max_lines=1, label=text(start, "seed"), elem_id="seed"), label="seed"),
        slider("presence_penalty", 0, 2, 0, 0.05),
        slider("frequency_penalty", 0, 2, 0, 0.05),
        slider("penalty_decay", 0.9, 1, 0.996, 0.001),
        say_in(gr.Textbox("", lines=2, max_lines=4, label=text(start, "stop")), label="stop"),
    ]


class Server:
    """The app, served by threads of its own from construction until `close`.

    Args:
        models: names for `visualrwkv.load` to offer beside the embedded model; the first is loaded at once.
        host, port: where to listen; port None takes the first free one from 7860.
        share: ask for a public address, too.
        auth: (user, password) pairs; none asks for no login.
        device, dtype, quantize: for `visualrwkv.load`.
        sessions: most conversations kept at a time.
        idle: minutes after which an unused one is closed.
        concurrency: replies written at the same time.
        queue: most requests that wait.
        max_upload: largest uploaded file, in MiB.
        grace: seconds between the closing of a page and that of its conversation.

    Attributes:
        url, share_url: its addresses. models, sessions, page: its parts.

    Raises:
        InputError: a model cannot be loaded, or the port is taken.
    """

    def __init__(
        self,
        models=(),
        host: str = "127.0.0.1",
        port: int | None = None,
        share: bool = False,
        auth=(),
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        sessions: int = 64,
        idle: float = 30,
        concurrency: int = 2,
        queue: int = 32,
        max_upload: int = 40,
        grace: float = 60,
    ):
        bind(host, port).close()  # before any model is loaded; uvicorn would write into the log
        self.models = Models(models, device, dtype, quantize)
        self._outer = os.environ.get("GRADIO_TEMP_DIR")
        self._own = Path(tempfile.mkdtemp(prefix="visualrwkv-demo-", dir=self._outer))
        os.environ["GRADIO_TEMP_DIR"] = str(self._own)  # where gradio's components and routes keep files
        try:
            self.sessions = Sessions(self._own / "sessions", sessions, 60 * idle, grace)
            talk = Talk(self.models, self.sessions, examples.draw(self._own / "examples"), Limits(replies=concurrency))
            self.page = build(talk)
            self.page.queue(api_open=False, max_size=queue, default_concurrency_limit=8)
            _, self.url, self.share_url = self.page.launch(
                server_name=in_address(host),
                server_port=port,
                share=share,
                auth=list(auth) or None,
                max_file_size=max_upload * 2**20,
                app_kwargs={"middleware": [Middleware(Guard, max_upload=(max_upload + 1) * 2**20)]},
                state_session_capacity=4 * sessions,
                theme=THEME,
                css_paths=STYLE,
                footer_links=[],
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                run_history=False,
                enable_monitoring=False,
            )
        except (OSError, ValueError) as error:  # gradio's words for a taken port, and for a proxy in the way
            self.close()
            place = host if port is None else f"{host}, port {port}"
            raise InputError(f"{place}: {one_line(error, 120)}; pass another --host or --port") from None
        except BaseException:
            self.close()
            raise
        self.sessions.watch()

    def close(self) -> None:
        """Stop serving; all conversations and files go."""
        if hasattr(self, "sessions"):
            self.sessions.close()
        if hasattr(self, "page"):
            self.page.close(verbose=False)
        if self._outer is None:
            os.environ.pop("GRADIO_TEMP_DIR", None)
        else:
            os.environ["GRADIO_TEMP_DIR"] = self._outer
        shutil.rmtree(self._own, ignore_errors=True)


def run(host: str = "127.0.0.1", share: bool = False, auth=(), **options) -> None:
    """Serve until Ctrl-C or SIGTERM; the arguments are those of `Server`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    server = Server(host=host, share=share, auth=auth, **options)
    try:
        print(f"VisualRWKV is at {server.url}", flush=True)
        if server.share_url:
            print(f"and for everybody at {server.share_url}", flush=True)
        if not auth and (share or not is_local(host)):
            print("Whoever reaches this address can use it; --auth USER:PASSWORD asks for a login.", file=sys.stderr)
        threading.Event().wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # whoever is impatient must not leave pictures on the disk
            signal.signal(number, signal.SIG_IGN)
        server.close()
