"""The Gradio app: a chat about pictures, served. `page.py` is what it looks like, `talk.py` is what it does.

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
from visualrwkv.demo import examples
from visualrwkv.demo.guard import Guard
from visualrwkv.demo.models import Models
from visualrwkv.demo.page import build
from visualrwkv.demo.sessions import Sessions
from visualrwkv.demo.talk import Limits, Talk
from visualrwkv.errors import one_line

STYLE = Path(__file__).with_name("style.css")
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
    # what stands out on its ground at least 3 to 1 (`test_demo_look.py`)
    color_accent="*primary_600",
    checkbox_border_color="*neutral_500",
    checkbox_border_color_dark="*neutral_300",
    checkbox_border_color_selected_dark="*neutral_300",
    checkbox_border_color_hover="*neutral_600",
    checkbox_border_color_hover_dark="*neutral_200",
)


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
