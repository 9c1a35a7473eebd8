"""A server for pictures, and files and folders that `diffusers-safe prepare-data` reads and writes."""

import hashlib
import json
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_safe import cli
from picture_files import encoded


def picture(number: int, size=(48, 40), mode="RGB") -> Image.Image:
    """A picture of coloured squares; each number gives another one."""
    colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST).convert(mode)


class PictureServer(ThreadingHTTPServer):
    """Serves picture N as `/N.png`; other names make it fail in the way that they name. Records the requests."""

    daemon_threads = True

    def __init__(self, address=("127.0.0.1", 0)):
        super().__init__(address, Handler)
        self.requests: list[str] = []
        self.headers: list[dict] = []
        self.delay = lambda path: 0.0  # seconds
        self.stopped = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path[1:]
        self.server.requests.append(name)
        self.server.headers.append(dict(self.headers))
        self.server.stopped.wait(self.server.delay(name))
        kind, rest = re.match(r"([a-z]*)-?([^?]*)", name).groups()
        first_time = self.server.requests.count(name) == 1
        if kind == "away":
            self.answer(302, Location=self.server.elsewhere)
        elif kind == "to":
            self.answer(302, Location=f"/{rest}")
        elif kind == "loop":
            self.answer(302, Location=self.path)
        elif kind == "status":
            self.answer(int(rest))
        elif kind == "busy" and first_time:
            self.answer(503, **{"Retry-After": "0"})
        elif kind == "mute":
            self.server.stopped.wait(30)
        elif kind in ("drip", "heads"):
            self.drip(kind)
        elif kind == "cut" and (first_time or rest == "always.png"):
            self.answer(200, encoded(picture(1)), cut=True)
        elif kind == "page":
            self.answer(200, b"<html>not here any more</html>", **{"Content-Type": "image/png"})
        elif kind == "broken":
            self.answer(200, encoded(picture(2, (400, 400)), "JPEG")[:900])
        elif kind == "noai":
            self.answer(200, encoded(picture(3)), **{"X-Robots-Tag": "noarchive, noai"})
        elif kind == "large":
            self.answer(200, encoded(picture(4)) + bytes(200_000))
        elif kind == "size":
            self.answer(200, encoded(picture(5, tuple(map(int, rest.removesuffix(".png").split("x"))))))
        elif kind == "same":
            self.answer(200, encoded(picture(0)))
        elif kind == "cookie":
            self.answer(200, encoded(picture(int(rest))), **{"Set-Cookie": "visitor=1"})
        else:
            self.answer(200, encoded(picture(int(rest.removesuffix(".png")))))

    def answer(self, status: int, body: bytes = b"", cut: bool = False, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def drip(self, kind: str):
        """Sends a byte from time to time, so that no single read is slow."""
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" if kind == "drip" else b"HTTP/1.1 200 OK\r\nX: "
        try:
            self.wfile.write(head)
            while not self.server.stopped.wait(0.1):
                self.wfile.write(b"a")
        except OSError:
            pass


def write_table(path: Path, rows: list[dict]) -> Path:
    table = datasets.Dataset.from_list(rows)
    {".csv": table.to_csv, ".parquet": table.to_parquet}.get(path.suffix, table.to_json)(path)
    return path


def web_table(path: Path, server: PictureServer, names: list[str]) -> Path:
    return write_table(path, [{"url": server.url(name), "text": f"caption of {name}"} for name in names])


def picture_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        picture(number).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}\n", encoding="utf-8")
    return folder


def prepare(source, folder, *options, private=True):
    """Runs the command and returns its report. By default it may download from this computer."""
    options = [*options, *(["--allow_private_addresses"] if private else [])]
    cli.main(["prepare-data", str(source), "--output_dir", str(folder), *map(str, options)])
    report = json.loads((folder / "report.json").read_text())
    assert report["rows"] == report["kept"] + sum(report["dropped"].values())
    assert not (folder / ".preparation").exists()
    return report


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(["prepare-data", *map(str, argv)])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error" in line]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in captured.err
    return lines[0]


def hashes(folder: Path) -> dict[str, str]:
    """Hashes of all files, except `.written.json`, which contains times."""
    files = sorted(path for path in folder.iterdir() if path.name != ".written.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def members(folder: Path) -> list[tuple[str, bytes]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    return found


def captions(folder: Path) -> list[str]:
    return [content.decode() for name, content in members(folder) if name.endswith(".txt")]
