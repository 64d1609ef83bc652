"""A real OpenAI-compatible server (llama.cpp's) with a home-made random model that sees pictures.

    python -m tests.chat_server FOLDER [KEY]

prints its address as its first line and serves until its standard input ends.
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, HEADS, FEED_FORWARD, CONTEXT = 64, 4, 128, 8192
PICTURE_PX, PATCH_PX = 28, 14
NAME = "tiny"


def write_language_model(path: Path) -> None:
    """A two-layer LLaMA with one token a byte."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    kinds = gguf.TokenType
    tokens, types = ["<unk>", "<s>", "</s>"], [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    for byte in range(256):
        tokens.append(f"<0x{byte:02X}>")
        types.append(kinds.BYTE if 32 <= byte < 127 or byte == 10 else kinds.UNUSED)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    for add, index in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(index)
    writer.add_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")

    def add_matrix(name: str, *shape: int) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32))

    add_matrix("token_embd.weight", len(tokens), WIDTH)
    add_matrix("output.weight", len(tokens), WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add_matrix(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
        add_matrix(f"blk.{layer}.ffn_gate.weight", FEED_FORWARD, WIDTH)
        add_matrix(f"blk.{layer}.ffn_up.weight", FEED_FORWARD, WIDTH)
        add_matrix(f"blk.{layer}.ffn_down.weight", WIDTH, FEED_FORWARD)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    _write(writer)


def write_projector(path: Path) -> None:
    """A one-layer CLIP with LLaVA's two linear layers into the language model."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    writer.add_string("clip.projector_type", "mlp")
    for name, value in (
        ("image_size", PICTURE_PX), ("patch_size", PATCH_PX), ("embedding_length", WIDTH), ("block_count", 2),
        ("feed_forward_length", FEED_FORWARD), ("projection_dim", WIDTH), ("attention.head_count", HEADS),
    ):  # fmt: skip
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])

    def add_linear(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", (rng.standard_normal((rows, columns)) / 8).astype(np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))

    patches = (PICTURE_PX // PATCH_PX) ** 2
    writer.add_tensor("v.class_embd", rng.standard_normal(WIDTH).astype(np.float32))
    writer.add_tensor(
        "v.patch_embd.weight", (rng.standard_normal((WIDTH, 3, PATCH_PX, PATCH_PX)) / 24).astype(np.float32)
    )
    writer.add_tensor("v.position_embd.weight", rng.standard_normal((patches + 1, WIDTH)).astype(np.float32))
    add_norm("v.pre_ln")
    add_norm("v.post_ln")
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            add_linear(f"v.blk.{layer}.{name}", WIDTH, WIDTH)
        add_linear(f"v.blk.{layer}.ffn_up", FEED_FORWARD, WIDTH)
        add_linear(f"v.blk.{layer}.ffn_down", WIDTH, FEED_FORWARD)
        for name in ("ln1", "ln2"):
            add_norm(f"v.blk.{layer}.{name}")
    add_linear("mm.0", WIDTH, WIDTH)
    add_linear("mm.2", WIDTH, WIDTH)
    _write(writer)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(folder: Path, key: str | None) -> None:
    """Serve until standard input ends."""
    import xllamacpp

    write_language_model(folder / "model.gguf")
    write_projector(folder / "projector.gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.mmproj.path = str(folder / "projector.gguf")
    params.mmproj_use_gpu = False
    params.n_ctx, params.n_parallel, params.n_predict = CONTEXT, 4, 64
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.model_alias = {NAME}
    params.warmup = False
    params.api_keys = [key] if key else []
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)  # noqa: T201
    sys.stdin.read()


@contextmanager
def run_chat_server(folder: Path, key: str | None = None) -> Iterator[str]:
    """The server in a process of its own; yields the URL for clients."""
    command = [sys.executable, "-m", "tests.chat_server", str(folder), *([key] if key else [])]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        address = process.stdout.readline().strip()
        if not address.startswith("http"):
            raise RuntimeError(f"the chat server did not start: {(folder / 'log').read_text()[-2000:]}")
        yield f"{address}/v1"
    finally:
        process.kill()
        process.communicate()


class ScriptedServer:
    """An endpoint whose answers a function makes, in this process.

    Args:
        respond: Takes the request's body; gives status, headers and body, or None to hang up without a word.

    Attributes:
        url: For clients.
        seen: Bodies of the requests so far.
    """

    def __init__(self, respond: Callable[[dict[str, Any]], tuple[int, dict[str, str], str] | None]) -> None:
        self.seen: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = respond(outer.seen[-1])
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, body = answer
                with contextlib.suppress(ConnectionError):  # the client may have given up
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # as many as a stage asks at once: of 5, the rest may be turned away

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ScriptedServer":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def completion(text: str) -> tuple[int, dict[str, str], str]:
    """A good answer."""
    body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {"total_tokens": 7}}
    return 200, {}, json.dumps(body)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
