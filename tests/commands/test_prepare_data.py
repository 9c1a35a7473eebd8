"""`diffusers-safe prepare-data` against a web server on this machine that does all that servers do."""

import csv
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from diffusers_safe import cli
from diffusers_safe.preparation import Filters, downloads, pictures
from diffusers_safe.preparation import prepare as preparation
from diffusers_safe.preparation.filters import Dropped
from diffusers_safe.preparation.pictures import read_picture
from scripts import environment


def draw(number: int, size=(48, 40), mode="RGB") -> Image.Image:
    """A picture of coloured squares, another for each number."""
    colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST).convert(mode)


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


class PictureServer(ThreadingHTTPServer):
    """`/N.png` is picture N; the rest is told by its name. Knows what it was asked."""

    daemon_threads = True

    def __init__(self, address=("127.0.0.1", 0)):
        super().__init__(address, Handler)
        self.asked: list[str] = []
        self.headers: list[dict] = []
        self.delay = lambda path: 0.0  # seconds before an answer
        self.stopped = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path[1:]
        self.server.asked.append(name)
        self.server.headers.append(dict(self.headers))
        self.server.stopped.wait(self.server.delay(name))
        kind, rest = re.match(r"([a-z]*)-?([^?]*)", name).groups()
        first_time = self.server.asked.count(name) == 1
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
            self.answer(200, encode(draw(1)), cut=True)
        elif kind == "page":
            self.answer(200, b"<html>not here any more</html>", **{"Content-Type": "image/png"})
        elif kind == "broken":
            self.answer(200, encode(draw(2, (400, 400)), "JPEG")[:900])
        elif kind == "noai":
            self.answer(200, encode(draw(3)), **{"X-Robots-Tag": "noarchive, noai"})
        elif kind == "large":
            self.answer(200, encode(draw(4)) + bytes(200_000))
        elif kind == "size":
            self.answer(200, encode(draw(5, tuple(map(int, rest.removesuffix(".png").split("x"))))))
        elif kind == "same":
            self.answer(200, encode(draw(0)))
        elif kind == "cookie":
            self.answer(200, encode(draw(int(rest))), **{"Set-Cookie": "visitor=1"})
        else:
            self.answer(200, encode(draw(int(rest.removesuffix(".png")))))

    def answer(self, status: int, body: bytes = b"", cut: bool = False, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def drip(self, kind: str):
        """A byte now and then, so that no single read is ever slow."""
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" if kind == "drip" else b"HTTP/1.1 200 OK\r\nX: "
        try:
            self.wfile.write(head)
            while not self.server.stopped.wait(0.1):
                self.wfile.write(b"a")
        except OSError:
            pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with PictureServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.stopped.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_table(path: Path, rows: list[dict]) -> Path:
    table = datasets.Dataset.from_list(rows)
    {".csv": table.to_csv, ".parquet": table.to_parquet}.get(path.suffix, table.to_json)(path)
    return path


def web_table(path: Path, server: PictureServer, names: list[str]) -> Path:
    return write_table(path, [{"url": server.url(name), "text": f"caption of {name}"} for name in names])


def picture_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        draw(number).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}\n", encoding="utf-8")
    return folder


def prepare(source, folder, *options, private=True):
    """From servers on this computer, too, unless it is said."""
    options = [*options, *(["--allow_private_addresses"] if private else [])]
    cli.main(["prepare-data", str(source), "--output_dir", str(folder), *map(str, options)])
    report = json.loads((folder / "report.json").read_text())
    assert report["rows"] == report["kept"] + sum(report["dropped"].values())
    assert not (folder / ".preparation").exists()
    return report


def hashes(folder: Path) -> dict[str, str]:
    """Of all files but that with the times when they were written."""
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


def test_what_servers_do_is_counted(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "MAX_BYTES", 100_000)
    names = ["0.png", "to-1.png", "loop-1", "status-404", "status-404?again", "status-500", "status-204", "busy-1.png",
             "mute", "drip", "heads", "cut-always.png", "page", "broken.jpg", "noai.png", "large.png", "same-0.png",
             "7.png", "0.png"]  # fmt: skip
    expected = {
        "HTTP 404": 2,
        "HTTP 500": 1,
        "HTTP 204": 1,
        "HTTP 503": 1,
        "too many redirects": 1,
        "slow answer": 3,
        "broken answer": 1,
        "no connection": 1,
        "not a picture": 1,
        "broken picture": 1,
        "not for training (X-Robots-Tag)": 1,
        "more than 0 MB": 1,
        "same picture as before": 1,
        "same address as before": 1,
        "no address": 2,
    }
    rows = [{"url": server.url(name), "text": name} for name in names]
    rows += [{"url": url, "text": "elsewhere"} for url in ("http://127.0.0.1:9/x.png", "ftp://127.0.0.1/x.png", None)]
    start = time.monotonic()
    report = prepare(write_table(tmp_path / "table.parquet", rows), tmp_path / "out", "--timeout", 2, "--retries", 0)
    assert report["dropped"] == expected
    assert report["changed"] == {"redirected": 1}
    assert captions(tmp_path / "out") == ["0.png", "to-1.png", "7.png"]
    assert time.monotonic() - start < 20  # three slow servers, at once
    told = capsys.readouterr().out
    assert (
        f"3  dropped: slow answer (the first: {server.url('mute')})" in told
        and "3  kept" in told
        and "1  of those kept: redirected" in told
    )


def test_what_may_pass_is_tried_again(server, tmp_path):
    table = web_table(tmp_path / "table.csv", server, ["busy-1.png", "cut-2.png", "status-503", "status-404"])
    report = prepare(table, tmp_path / "out", "--retries", 1, "--user_agent", "a test")
    assert report["kept"] == 2 and report["dropped"] == {"HTTP 404": 1, "HTTP 503": 1}
    assert report["examples"]["HTTP 404"] == server.url("status-404")
    assert sorted(server.asked) == ["busy-1.png", "busy-1.png", "cut-2.png", "cut-2.png", "status-404",
                                    "status-503", "status-503"]  # fmt: skip
    assert {headers["User-Agent"] for headers in server.headers} == {"a test"}


def test_no_answer_depends_on_another_and_servers_know_who_asks(server, tmp_path):
    prepare(web_table(tmp_path / "t.csv", server, [f"cookie-{i}" for i in range(4)]), tmp_path / "out",
            "--concurrency", 1)  # fmt: skip
    assert not any("Cookie" in headers for headers in server.headers)
    assert all(headers["User-Agent"].startswith("diffusers-safe/") for headers in server.headers)


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_the_network_changes_no_byte(server, tmp_path, form):
    names = [name for i in range(12) for name in (f"{i}.png", f"same-{i}", f"status-{404 + i % 2 * 6}?{i}")]
    table = web_table(tmp_path / "table.jsonl", server, names)
    options = ("--format", form, "--shard_size", 5)
    results = []
    for run, (delay, concurrency) in enumerate(
        [(lambda name: 0, 1), (lambda name: 0.2 * (name in ("0.png", "same-3")), 16), (lambda name: 0.01, 7)]
    ):
        server.delay = delay
        report = prepare(table, tmp_path / str(run), *options, "--concurrency", concurrency)
        assert report["kept"] == 12 and report["shards"] == 3 and report["dropped"]["same picture as before"] == 12
        results.append(hashes(tmp_path / str(run)))
    assert results[0] == results[1] == results[2] and len(results[0]) == 4


def test_concurrency_is_a_limit(server, tmp_path):
    now, most, lock = 0, 0, threading.Lock()

    def delay(name):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return 0

    server.delay = delay
    prepare(web_table(tmp_path / "t.csv", server, [f"{i}.png" for i in range(12)]), tmp_path / "out",
            "--concurrency", 3)  # fmt: skip
    assert 2 <= most <= 3


def test_filters_and_their_counts(server, tmp_path):
    rows = [
        {"URL": server.url("0.png"), "TEXT": "a small cat", "score": 6.5},
        {"URL": server.url("1.png"), "TEXT": "a KNIFE, sharp", "score": 7.0},
        {"URL": server.url("2.png"), "TEXT": "penknifes are other words", "score": 7.0},
        {"URL": server.url("3.png"), "TEXT": "in the style of van gogh", "score": 7.0},
        {"URL": server.url("4.png"), "TEXT": "a cat", "score": 9.0},
        {"URL": server.url("5.png"), "TEXT": " ", "score": 9.0},
        {"URL": server.url("6.png"), "TEXT": None, "score": 9.0},
        {"URL": server.url("7.png"), "TEXT": "not pretty", "score": 5.9},
        {"URL": server.url("8.png"), "TEXT": "nobody knows", "score": None},
        {"URL": server.url("size-39x80.png"), "TEXT": "too narrow", "score": 6.0},
        {"URL": server.url("size-40x81.png"), "TEXT": "too long", "score": 6.0},
        {"URL": server.url("size-80x40.png"), "TEXT": "just right", "score": 6.0},
    ]
    (tmp_path / "forbidden.txt").write_text("# words\nknife\nVan Gogh\n")
    table = write_table(tmp_path / "table.csv", rows)
    options = ("--url_column", "URL", "--caption_column", "TEXT", "--aesthetic_column", "score", "--min_aesthetic", 6,
               "--min_side", 40, "--max_aspect_ratio", 2, "--min_caption_length", 6,
               "--forbidden_concepts", tmp_path / "forbidden.txt")  # fmt: skip
    report = prepare(table, tmp_path / "out", *options)
    assert captions(tmp_path / "out") == ["a small cat", "penknifes are other words", "just right"]
    assert report["dropped"] == {
        "forbidden concept": 2,
        "no caption": 2,
        "aspect ratio": 1,
        "low aesthetic score": 1,
        "no aesthetic score": 1,
        "short caption": 1,
        "short side": 1,
    }
    assert sorted(server.asked) == ["0.png", "2.png", "size-39x80.png", "size-40x81.png", "size-80x40.png"]
    assert json.loads(dict(members(tmp_path / "out"))["000002.json"])["aesthetic"] == 6.0
    asked = len(server.asked)
    assert prepare(table, tmp_path / "out", *options) == report and len(server.asked) == asked  # done is done


def test_shards_load_with_datasets(server, tmp_path):
    table = web_table(tmp_path / "table.csv", server, [f"{i}.png" for i in range(5)])
    for form in ("webdataset", "parquet"):
        out = tmp_path / form
        prepare(table, out, "--format", form, "--shard_size", 2, "--resize", 20)
        for dataset in (
            datasets.load_dataset(form, data_dir=str(out), split="train"),
            datasets.load_dataset(str(out), split="train"),
            list(datasets.load_dataset(form, data_dir=str(out), split="train", streaming=True)),
        ):
            assert len(dataset) == 5
            row = dataset[3]
            image, text, about = (
                (row["jpg"], row["txt"], row["json"]) if form == "webdataset" else (row["image"], row["text"], row)
            )
            assert image.size == (24, 20) and image.mode == "RGB" and text == "caption of 3.png"
            assert about["url"] == server.url("3.png")
            assert (about["width"], about["height"], about["original_width"], about["original_height"]) == (
                24, 20, 48, 40)  # fmt: skip
            assert about["sha256"] == hashlib.sha256(encode(draw(3))).hexdigest()
    assert [name for name, _ in members(tmp_path / "webdataset")][:4] == [
        "000000.jpg", "000000.txt", "000000.json", "000001.jpg"]  # fmt: skip


def test_a_folder_with_text_files_or_metadata(tmp_path):
    folder = picture_folder(tmp_path / "pictures", 3)
    draw(8).save(folder / "lonely.png")
    (folder / "01.png").write_bytes(b"no picture")
    assert prepare(folder, tmp_path / "pairs")["dropped"] == {"no caption": 1, "not a picture": 1}
    assert captions(tmp_path / "pairs") == ["picture 0", "picture 2"]
    about = json.loads(dict(members(tmp_path / "pairs"))["000001.json"])
    assert about["file_name"] == "02.png"
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file_name", "title"], ["02.png", "the second"], ["gone.png", "x"]])
    report = prepare(folder, tmp_path / "metadata", "--caption_column", "title")
    assert report["dropped"] == {"no such file": 1} and captions(tmp_path / "metadata") == ["the second"]
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "café"}\n', encoding="utf-8")
    prepare(folder, tmp_path / "jsonl", "--format", "parquet")
    assert datasets.load_dataset("parquet", data_dir=str(tmp_path / "jsonl"), split="train")["text"][:] == ["café"]


def test_several_tables_and_a_part_of_them(server, tmp_path):
    for part in (1, 0):
        web_table(tmp_path / f"part-{part}[x].parquet", server, [f"{part * 2 + i}.png" for i in range(2)])
    pattern = tmp_path / "part-*.parquet"
    assert prepare(pattern, tmp_path / "all")["kept"] == 4
    assert captions(tmp_path / "all") == [f"caption of {i}.png" for i in range(4)]
    prepare(pattern, tmp_path / "some", "--split", "train[1:3]")
    assert captions(tmp_path / "some") == ["caption of 1.png", "caption of 2.png"]
    assert prepare(tmp_path / "part-1[x].parquet", tmp_path / "one")["kept"] == 2


def test_a_dataset_of_the_hub(server, tmp_path, monkeypatch):
    def load_dataset(name, config, split):
        assert (name, config, split) == ("user/laion", "small", "test")
        return datasets.Dataset.from_list([{"url": server.url("1.png"), "text": "one"}])

    monkeypatch.setattr("diffusers_safe.preparation.table.load_dataset", load_dataset)
    prepare("user/laion", tmp_path / "out", "--dataset_config_name", "small", "--split", "test")
    assert captions(tmp_path / "out") == ["one"]


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.8.8.8", "0.0.0.0", "0"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
        *("169.254.169.254", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "[fe80::1]", "[fc00::1]"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "user:secret@127.0.0.1"),
    ],
)
def test_private_addresses_are_not_asked(server, tmp_path, host):
    url = f"http://{host}:{server.server_address[1]}/0.png"
    table = write_table(tmp_path / "table.csv", [{"url": url, "text": "x"}])
    with pytest.raises(SystemExit, match=r"rows: (private address|no address) 1 \(the first: ") as stop:
        prepare(table, tmp_path / "out", "--retries", 0, private=False)
    assert server.asked == [] and ("private" in stop.value.code or host == "0177.0.0.1")  # which httpx refuses itself


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"])
def test_public_addresses_are_public(address):
    assert downloads.is_public(address)


def test_names_and_redirects_do_not_lead_into_private_networks(server, tmp_path, monkeypatch):
    """127.0.0.1 stands for the internet here, 127.0.0.2 for what lies behind a firewall."""
    monkeypatch.setenv("NO_PROXY", "*")
    port = server.server_address[1]
    answers = {
        "public.example": ["127.0.0.1"],
        "inside.example": ["127.0.0.2"],
        "both.example": ["127.0.0.1", "127.0.0.2"],
    }
    real, asked = socket.getaddrinfo, []

    def getaddrinfo(host, *arguments, **options):
        host = host.decode() if isinstance(host, bytes) else host
        asked.append(host)
        if host == "rebound.example":  # the first answer is for the check, the second for who looks again
            return real("127.0.0.1" if asked.count(host) == 1 else "127.0.0.2", *arguments, **options)
        return [entry for known in answers.get(host, [host]) for entry in real(known, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(downloads, "is_public", lambda address: address != "127.0.0.2")
    with PictureServer(("127.0.0.2", port)) as inside:
        thread = threading.Thread(target=inside.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        server.elsewhere = f"http://inside.example:{port}/7.png"
        hosts = {"public": "1.png", "inside": "2.png", "both": "3.png", "rebound": "4.png"}
        rows = [f"http://{name}.example:{port}/{picture}" for name, picture in hosts.items()]
        rows += [server.url("away"), f"http://public.example:{port}/to-5.png", f"http://127.0.0.2:{port}/6.png"]
        table = write_table(tmp_path / "t.csv", [{"url": url, "text": url} for url in rows])
        report = prepare(table, tmp_path / "out", "--retries", 0, private=False)
        assert report["dropped"] == {"private address": 4} and inside.asked == []
        assert sorted(server.asked) == ["1.png", "4.png", "5.png", "away", "to-5.png"]
        assert {headers["Host"] for headers in server.headers} > {f"public.example:{port}"}
        inside.stopped.set()
        inside.shutdown()
        thread.join()


def test_a_proxy_is_not_asked_for_private_addresses(server, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", server.url("")[:-1])
    table = write_table(
        tmp_path / "t.csv", [{"url": url, "text": "x"} for url in ("http://10.0.0.1/0.png", "http://localhost/1.png")]
    )
    with pytest.raises(SystemExit, match="private address 2"):
        prepare(table, tmp_path / "out", "--retries", 0, private=False)
    assert server.asked == []


def outside(tmp_path) -> Path:
    (tmp_path / "private").mkdir()
    draw(9).save(tmp_path / "private" / "me.png")
    (tmp_path / "private" / "me.txt").write_text("a secret")
    return tmp_path / "private"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "name", ["../private/me.png", "{private}/me.png", "sub/../../private/me.png", "../pictures-2/x.png"]
)
def test_metadata_does_not_lead_out_of_its_folder(tmp_path, capsys, kind, name):
    private, folder = outside(tmp_path), picture_folder(tmp_path / "pictures", 2)
    name = name.format(private=private)
    write_table(folder / f"metadata.{kind}", [{"file_name": file, "text": "x"} for file in ("00.png", name)])
    told = refused(capsys, folder, "--output_dir", tmp_path / "out")
    assert f"me.png' lies outside of {folder}" in told or "x.png' lies outside" in told
    assert name in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", ["l.png", "00.txt", "folder", "l.tar", "metadata.csv"])
def test_links_do_not_lead_out_of_the_folder(tmp_path, capsys, link):
    private, folder = outside(tmp_path), picture_folder(tmp_path / "pictures", 2)
    (folder / link).unlink(missing_ok=True)
    (folder / link).symlink_to({"folder": private, "00.txt": private / "me.txt"}.get(link, private / "me.png"))
    told = refused(capsys, folder, "--output_dir", tmp_path / "out")
    assert f"{link}' lies outside of {folder}" in told and not (tmp_path / "out").exists()


def test_links_inside_of_the_folder_are_followed(tmp_path):
    folder = picture_folder(tmp_path / "pictures", 2)
    (folder / "sub").mkdir()
    (folder / "sub" / "x.png").symlink_to("../00.png")
    (folder / "sub" / "x.txt").write_text("again")
    assert prepare(folder, tmp_path / "out")["dropped"] == {"same picture as before": 1}
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    assert prepare(tmp_path / "link", tmp_path / "linked")["kept"] == 2
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "0123", tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for name in ("00.png", "00.txt"):
        (snapshot / name).symlink_to(blobs / name)
    assert prepare(snapshot, tmp_path / "snapshot")["kept"] == 1


def img2dataset_folder(folder: Path, form: str, count: int = 6) -> Path:
    """What img2dataset writes: shards of three samples, each with a table and counts; the first has no picture."""
    folder.mkdir()
    for shard in range(count // 3 + 1):
        samples = [shard * 3 + i - 3 for i in range(3)] if shard else []
        facts = [
            {"key": f"{i:09}", "caption": f"picture {i}", "url": f"http://example.org/{i}", "score": i}
            for i in samples
        ]
        write_table(folder / f"{shard:05}.parquet", facts or [{"key": "x", "caption": "failed"}])
        (folder / f"{shard:05}_stats.json").write_text(json.dumps({"count": 3, "successes": len(samples)}))
        files = [
            (f"{fact['key']}.{ending}", content)
            for i, fact in zip(samples, facts)
            for ending, content in {
                "jpg": encode(draw(i), "JPEG"),
                "json": json.dumps(fact).encode(),
                "txt": fact["caption"].encode(),
            }.items()
        ]
        if form == "webdataset":
            with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
                for name, content in files:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        else:
            (folder / f"{shard:05}").mkdir()
            for name, content in files:
                (folder / f"{shard:05}" / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("form", ["webdataset", "files"])
def test_the_folders_of_img2dataset_are_read(tmp_path, form):
    folder = img2dataset_folder(tmp_path / "data[1]", form)
    report = prepare(folder, tmp_path / "out", "--shard_size", 4)
    assert (
        report["kept"] == 6
        and report["dropped"] == {}
        and captions(tmp_path / "out") == [f"picture {i}" for i in range(6)]
    )
    about = json.loads(dict(members(tmp_path / "out"))["000004.json"])
    assert about["sha256"] == hashlib.sha256(encode(draw(4), "JPEG")).hexdigest()
    assert about["file_name"] == ("00002.tar/" if form == "webdataset" else "00002/") + "000000004.jpg"


def test_fields_of_samples_in_tar_files(tmp_path, capsys):
    folder = img2dataset_folder(tmp_path / "data", "webdataset")
    options = ("--caption_column", "url", "--aesthetic_column", "score", "--min_aesthetic", 3)
    report = prepare(folder, tmp_path / "out", *options)
    assert report["dropped"] == {"low aesthetic score": 3}
    assert captions(tmp_path / "out") == [f"http://example.org/{i}" for i in (3, 4, 5)]
    told = refused(capsys, folder, "--output_dir", tmp_path / "none", "--caption_column", "TEXT")
    assert "no column 'TEXT', only key, caption, url, score, txt, in the tar files" in told
    with tarfile.open(folder / "00003.tar", "w") as tar:
        member = tarfile.TarInfo("1.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(member)
    told = refused(capsys, folder, "--output_dir", tmp_path / "none")
    assert "00003.tar: the member '1.jpg' is a link, which is not followed" in told


def test_what_a_folder_holds_is_said_where_nothing_fits(tmp_path, capsys):
    folder = picture_folder(tmp_path / "pictures", 2)
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / "captions.csv").write_text("file,text\n")
    told = refused(capsys, folder, "--output_dir", tmp_path / "out")
    assert told.endswith("nor tar files; the folder holds 2 .png (00.png, ...) and 1 .csv (captions.csv)")


def average(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).reshape(-1, 3).mean(0)


@pytest.mark.parametrize(
    "data, expected, changes",
    [
        (lambda: encode(Image.new("RGB", (20, 10), (200, 50, 0)), "JPEG"), (200, 50, 0), ()),
        (lambda: encode(Image.new("L", (20, 10), 90)), (90, 90, 90), ("L to RGB",)),
        (lambda: encode(Image.new("1", (20, 10), 1)), (255, 255, 255), ("1 to RGB",)),
        (lambda: encode(Image.new("I;16", (20, 10), 90 * 257)), (90, 90, 90), ("I;16 to RGB",)),
        (lambda: encode(Image.new("F", (20, 10), 90), "TIFF"), (90, 90, 90), ("F to RGB",)),
        (lambda: encode(Image.new("RGB", (20, 10), (9, 99, 199)).quantize()), (9, 99, 199), ("P to RGB",)),
        (lambda: encode(Image.new("CMYK", (20, 10), (255, 0, 255, 0)), "JPEG"), (0, 255, 0), ("CMYK to RGB",)),
        (
            lambda: encode(Image.new("RGBA", (20, 10), (0, 0, 0, 51))),
            (204, 204, 204),
            ("RGBA to RGB", "laid on white"),
        ),
        (
            lambda: encode(Image.new("P", (20, 10)), transparency=0),
            (255, 255, 255),
            ("P to RGB", "laid on white"),
        ),
        (
            lambda: encode(Image.new("RGB", (20, 10)), transparency=(0, 0, 0)),
            (255, 255, 255),
            ("laid on white",),
        ),
    ],
)
def test_every_mode_becomes_rgb(data, expected, changes):
    picture = read_picture(data(), Filters())
    assert picture.changes == changes and picture.size == (20, 10)
    assert np.abs(average(picture.jpeg) - expected).max() < 4
    assert Image.open(io.BytesIO(picture.jpeg)).mode == "RGB"


def test_pictures_stand_upright_and_lose_their_metadata():
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    exif[0x010E] = "secret place"
    data = encode(image, "JPEG", exif=exif, comment=b"secret words", quality=95)
    picture = read_picture(data, Filters(min_side=20, max_aspect_ratio=2))
    upright = Image.open(io.BytesIO(picture.jpeg))
    assert picture.changes == ("turned upright",) and upright.size == (20, 40) == picture.original_size
    assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[2] > 200
    assert not upright.getexif() and b"secret" in data and b"secret" not in picture.jpeg


@pytest.mark.parametrize("size, resized", [((100, 50), (40, 20)), ((33, 77), (20, 47)), ((20, 90), (20, 90))])
def test_resize_shrinks_the_shorter_side(size, resized):
    picture = read_picture(encode(draw(0, size)), Filters(), resize=20)
    assert picture.size == resized == Image.open(io.BytesIO(picture.jpeg)).size and picture.original_size == size
    assert picture.changes == (("shrunk",) if size != resized else ())


@pytest.mark.parametrize(
    "data, reason",
    [
        (lambda: b"", "not a picture"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (lambda: encode(draw(0))[:80], "broken picture"),
        (lambda: encode(draw(0, (300, 300)), "JPEG")[:-300], "broken picture"),
        (lambda: encode(draw(0, (40, 26))), "too many pixels"),
        (lambda: encode(draw(0, (90, 90))), "too many pixels"),
    ],
)
def test_what_is_no_good_picture_has_a_reason(monkeypatch, data, reason):
    if reason == "too many pixels":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Dropped, match=f"^{reason}$"):
        read_picture(data(), Filters())


def test_any_error_of_a_decoder_is_a_broken_picture(monkeypatch):
    def fail(image):
        raise RuntimeError("a bug in a decoder")

    monkeypatch.setattr(pictures, "to_rgb", fail)
    with pytest.raises(Dropped, match="broken picture"):
        read_picture(encode(draw(0)), Filters())


def test_kill_9_and_the_same_command_again(server, tmp_path):
    names = [name for i in range(24) for name in (f"{i}.png", f"status-404?{i}")]
    table = web_table(tmp_path / "table.csv", server, names)
    options = ("--shard_size", "4", "--concurrency", "2")
    prepare(table, tmp_path / "whole", *options)
    server.delay = lambda name: 0.05
    server.asked.clear()
    out = tmp_path / "out"
    command = [sys.executable, "-m", "diffusers_safe.cli", "prepare-data", str(table), "--output_dir", str(out),
               "--allow_private_addresses"]  # fmt: skip
    env = environment(HF_DATASETS_CACHE=str(tmp_path / "cache"), NO_PROXY="127.0.0.1")
    process = subprocess.Popen([*command, *options], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "train-00001.tar").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "report.json").exists() and (out / ".preparation").is_dir()
    finished = {path: path.stat() for path in out.glob("*.tar")}
    server.delay = lambda name: 0
    server.asked.clear()
    prepare(table, out, *options)
    assert hashes(out) == hashes(tmp_path / "whole") and 2 <= len(finished) < 6
    for path, before in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    done = 4 * len(finished)  # pictures 0 to done - 1
    assert not {f"{i}.png" for i in range(done)} & set(server.asked) and len(server.asked) == 48 - 2 * done + 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_a_stop_at_every_step_that_can_be_seen_on_disk(tmp_path, monkeypatch, form):
    folder = picture_folder(tmp_path / "pictures", 5)
    (folder / "01.png").write_bytes(b"no picture")
    (folder / "04.png").write_bytes(b"no picture")
    options = ("--format", form, "--shard_size", 2)
    report = prepare(folder, tmp_path / "whole", *options)
    assert (report["kept"], report["shards"], report["dropped"]) == (3, 2, {"not a picture": 2})
    replace, stops = os.replace, 0
    while True:
        out, left = tmp_path / f"out-{stops}", stops

        def replace_or_stop(source, target):
            nonlocal left
            if left == 0:
                raise Killed
            replace(source, target)
            left -= 1

        monkeypatch.setattr(os, "replace", replace_or_stop)
        try:
            prepare(folder, out, *options)
        except Killed:
            stops += 1
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", replace)
        before = {path: path.stat().st_ino for path in out.glob("train-*")}
        assert prepare(folder, out, *options) == report
        assert hashes(out) == hashes(tmp_path / "whole")
        assert all(path.stat().st_ino == inode for path, inode in before.items())
    assert stops == 10  # settings, two shards with their records and notes in .written.json, report with two


def test_a_stop_when_all_is_done_leaves_no_trace(tmp_path, monkeypatch):
    unlink = Path.unlink

    def stop(path, **options):
        if path.suffix == ".json":
            raise Killed
        unlink(path, **options)

    folder = picture_folder(tmp_path / "pictures", 1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", stop)
        prepare(folder, tmp_path / "out")
    assert (tmp_path / "out" / ".preparation").is_dir()
    assert prepare(folder, tmp_path / "out")["kept"] == 1


def test_a_network_that_is_down_is_not_taken_for_dead_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(preparation, "MAX_DEAD_HOSTS", 5)
    urls = [f"http://127.0.0.{i}:9/{j}.png" for i in range(1, 6) for j in range(3)]
    few = write_table(tmp_path / "few.csv", [{"url": url, "text": "x"} for url in urls[:12]])
    with pytest.raises(SystemExit, match="no picture is left of 12 rows: no connection 12"):
        prepare(few, tmp_path / "few", "--retries", 0)
    table = write_table(tmp_path / "table.csv", [{"url": url, "text": "x"} for url in urls])
    with pytest.raises(SystemExit, match="5 servers in a row cannot be reached, the last .*: is the network down"):
        prepare(table, tmp_path / "out", "--retries", 0)
    assert not (tmp_path / "out" / "report.json").exists()


def test_nothing_left_is_an_error_that_says_why_and_leaves_nothing(tmp_path):
    folder = picture_folder(tmp_path / "pictures", 2)
    with pytest.raises(SystemExit) as stop:
        prepare(folder, tmp_path / "out", "--forbidden_concepts", "picture")
    assert stop.value.code == "error: no picture is left of 2 rows: forbidden concept 2"  # exit code 1
    assert not (tmp_path / "out").exists()
    assert prepare(folder, tmp_path / "out")["kept"] == 2


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(["prepare-data", *map(str, argv)])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error" in line]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (["{folder}", "--format", "zip"], "format 'zip': unknown; allowed are webdataset, parquet"),
        (["{folder}", "--shard_size", "0"], "shard_size 0: must be at least 1"),
        (["{folder}", "--resize", "0"], "resize 0: must be at least 1"),
        (["{folder}", "--jpeg_quality", "96"], "jpeg_quality 96: must lie between 1 and 95"),
        (["{folder}", "--timeout", "0"], "timeout 0.0: must be above 0 seconds"),
        (["{folder}", "--retries", "-1"], "retries -1: must be at least 0"),
        (["{folder}", "--concurrency", "0"], "concurrency 0: must be at least 1"),
        (["{folder}", "--user_agent", "two\nlines"], "user_agent 'two\\nlines': must be one line of ASCII"),
        (["{folder}", "--max_aspect_ratio", "0.5"], "max_aspect_ratio 0.5: must be at least 1"),
        (["{folder}", "--min_side", "0"], "min_side 0: must be at least 1"),
        (["{folder}", "--min_aesthetic", "5"], "min_aesthetic 5.0: needs aesthetic_column"),
        (["{table}", "--aesthetic_column", "score"], "aesthetic_column 'score': needs min_aesthetic"),
        (["{folder}", "--forbidden_concepts", "no.txt"], "concepts file no.txt: no such file"),
        (["{folder}", "--split", "test"], "split 'test': means nothing for "),
        (["{folder}", "--url_column", "URL"], "url_column 'URL': means nothing for "),
        (["{table}", "--dataset_config_name", "x"], "dataset_config_name 'x': means nothing for "),
        (["{table}", "--split", "test"], 'Unknown split "test"'),
        (["{table}", "--url_column", "URL"], "no column 'URL', only url, text, score, tags"),
        (["{table}", "--caption_column", "TEXT"], "no column 'TEXT', only url, text, score, tags"),
        (["{table}", "--caption_column", "tags"], "column 'tags' holds List, not plain values"),
        (["{folder}", "--aesthetic_column", "score", "--min_aesthetic", "5"], "no column 'score', only file_name"),
        (["no.parquet"], "source no.parquet: no such file"),
        (["no-*.csv"], "source no-*.csv: no such file"),
        (["no/where"], "source no/where: "),
        (
            ["{empty}"],
            "neither metadata.csv, metadata.jsonl, metadata.parquet, nor a .txt file next to a picture, nor",
        ),
        (["{empty}"], "the folder holds no files"),
        (["{table}", "--allow_private"], "unrecognized arguments: --allow_private"),
        (["{broken}"], "broken.parquet: "),
        (["{nothing}"], 'nothing.csv: Instruction "train" corresponds to no data'),
        ([], "required: --source"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    picture_folder(tmp_path / "folder", 1)
    row = {"url": "http://127.0.0.1:9/x.png", "text": "x", "score": 5.0, "tags": ["a"]}
    write_table(tmp_path / "table.jsonl", [row])
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    (tmp_path / "nothing.csv").write_text("url,text\n")
    files = {name.split(".")[0]: tmp_path / name for name in os.listdir(tmp_path)}
    told = refused(capsys, *(option.format(**files) for option in options), "--output_dir", tmp_path / "out")
    assert message in told and not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, capsys):
    folder = picture_folder(tmp_path / "pictures", 2)
    assert "holds something else (00.png); give an empty or a new folder" in refused(
        capsys, folder, "--output_dir", folder
    )
    out = tmp_path / "out"
    prepare(folder, out)
    before = hashes(out)
    assert "holds another preparation (min_side 1, not 9)" in refused(
        capsys, folder, "--output_dir", out, "--min_side", 9
    )
    (folder / "00.txt").write_text("another caption")
    assert "holds another preparation (table " in refused(capsys, folder, "--output_dir", out)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, folder, "--output_dir", tmp_path / "file")
    assert hashes(out) == before
    (out / "report.json").write_text("[]")
    assert "report.json is none of a preparation" in refused(capsys, folder, "--output_dir", out)


def test_what_stopped_halfway_is_recognised(tmp_path, capsys, monkeypatch):
    folder, out = picture_folder(tmp_path / "pictures", 5), tmp_path / "out"
    options = ("--output_dir", out, "--shard_size", 2)

    def stop(path, text):
        raise OSError("the disk is full")

    monkeypatch.setattr(preparation, "write_own", stop)  # of the report
    with pytest.raises(SystemExit, match="error: the disk is full"):
        cli.main(["prepare-data", str(folder), *map(str, options)])
    assert "holds another preparation (shard_size 2, not 3)" in refused(
        capsys, folder, "--output_dir", out, "--shard_size", 3
    )
    with FileLock(out / ".lock"):
        assert "another run is at work there" in refused(capsys, folder, *options)
    (out / "train-00001.tar").unlink()
    assert "train-00001.tar was finished and is gone; delete " in refused(capsys, folder, *options)
    record = out / ".preparation" / "00001.json"
    good = json.loads(record.read_text())
    damaged = [{"candidates": value} for value in (-1, 99, 10**30, "1", 1.5, True, None)]
    damaged += [{"dropped": value} for value in ("abc", {"a": "b"}, {"a": -1}, {"a": 1}, [1], None)]
    damaged += [{"kept": value} for value in (-3, "1", None, 5)]
    damaged += [{"hashes": value} for value in ([], [1, 2], ["a", "a"], "ab", None)]
    damaged += [{"changed": "x"}, {"examples": None}, {"examples": {"a": 1}}]
    for text in ["{", "[1]", "[" * 100_000, *(json.dumps({**good, **wrong}) for wrong in damaged)]:
        record.write_text(text)
        assert "00001.json: broken record; delete it" in refused(capsys, folder, *options)
    record.unlink()
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert prepare(folder, out, "--shard_size", 2)["shards"] == 3


def test_overwrite_deletes_the_shards_of_another_preparation_and_nothing_else(tmp_path, capsys):
    folder, out = picture_folder(tmp_path / "pictures", 5), tmp_path / "out"
    prepare(folder, out, "--shard_size", 2)
    for name in ("notes.txt", "train-00007.tar"):
        (out / name).write_text("mine")
    options = ("--output_dir", out, "--shard_size", 3)
    before = hashes(out)
    assert "give an empty or a new folder, or --overwrite to replace them" in refused(capsys, folder, *options)
    assert hashes(out) == before
    cli.main(["prepare-data", str(folder), *map(str, options), "--overwrite"])
    shards = {path.name for path in out.glob("train-*")}
    assert shards == {"train-00000.tar", "train-00001.tar"} and (out / "notes.txt").read_text() == "mine"
    assert (out / ".replaced-1" / "train-00007.tar").read_text() == "mine"
    assert json.loads((out / "report.json").read_text())["settings"]["shard_size"] == 3


def test_a_finished_preparation_that_was_damaged_is_told_and_made_again(tmp_path, capsys):
    folder, out = picture_folder(tmp_path / "pictures", 3), tmp_path / "out"
    report = prepare(folder, out, "--shard_size", 2)
    whole, options = hashes(out), ("--output_dir", out, "--shard_size", 2)
    damaged = [{"dropped": [1]}, {"rows": None}, {"rows": 4}, {"changed": "x"}, {"shards": "many"}, {"shards": 10**9},
               {"examples": None}, {"kept": -3}, {"kept": "3"}]  # fmt: skip
    texts = [json.dumps({key: value for key, value in report.items() if key != "rows"})]
    for text in [*texts, *(json.dumps({**report, **wrong}) for wrong in damaged)]:
        (out / "report.json").write_text(text)
        assert "report.json is damaged; give an empty or a new folder, or --over" in refused(capsys, folder, *options)
    (out / "report.json").write_text("[" * 100_000)
    assert "report.json is none of a preparation" in refused(capsys, folder, *options)
    (out / "report.json").write_text(json.dumps(report))
    (out / "train-00001.tar").unlink()
    assert "train-00001.tar was finished and is gone; give " in refused(capsys, folder, *options)
    assert prepare(folder, out, "--shard_size", 2, "--overwrite") == report and not (out / "train-00002.tar").exists()
    assert (out / ".replaced-1" / "report.json").is_file()  # a person wrote it
    shards = sorted(path for path in out.glob("train-*"))
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in shards] == [whole[path.name] for path in shards]


@pytest.mark.parametrize("shards", [3, 10**9])
def test_files_that_a_strange_report_names_are_moved(tmp_path, shards):
    folder, out = picture_folder(tmp_path / "pictures", 1), tmp_path / "out"
    out.mkdir()
    for number in range(3):
        (out / f"train-0000{number}.tar").write_text("mine")
    (out / "report.json").write_text(json.dumps({"shards": shards, "settings": {"format": "webdataset"}}))
    assert prepare(folder, out, "--overwrite")["shards"] == 1
    assert {path.name for path in out.glob("train-*")} == {"train-00000.tar"}
    moved = {path.name for path in (out / ".replaced-1").iterdir()}
    assert moved == {"report.json", *(f"train-0000{number}.tar" for number in range(3))}


def test_notes_in_the_folder_of_the_state_stay(tmp_path):
    folder, out = picture_folder(tmp_path / "pictures", 1), tmp_path / "out"
    (out / ".preparation").mkdir(parents=True)
    for name in ("my_notes.txt", "00000.json"):  # a record without settings is none
        (out / ".preparation" / name).write_text("mine")
    for options in ([], ["--overwrite", "--resize", "9"]):
        cli.main(["prepare-data", str(folder), "--output_dir", str(out), *options])
        assert [path.name for path in (out / ".preparation").iterdir()] == ["my_notes.txt"]
    assert not (out / ".replaced-1").exists()


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
@pytest.mark.parametrize("name, kind", [(".preparation", "file"), (".preparation", "link"), ("report.json", "folder")])
def test_what_cannot_make_way_is_refused_before_any_work(tmp_path, capsys, name, kind, options):
    folder, out = picture_folder(tmp_path / "pictures", 1), tmp_path / "out"
    out.mkdir()
    make = {"file": Path.touch, "folder": Path.mkdir, "link": lambda path: path.symlink_to(tmp_path)}[kind]
    make(out / name)
    told = refused(capsys, folder, "--output_dir", out, *options)
    assert f"{name} is a {kind}" in told and [path.name for path in out.iterdir()] == [name]


@pytest.mark.parametrize("name", ["pictures/metadata.jsonl", "table.jsonl", "table.json"])
@pytest.mark.parametrize("between", ["", "\n"])
def test_deep_json_is_told_before_its_reader_dies(tmp_path, capsys, name, between):
    picture_folder(tmp_path / "pictures", 1)
    deep = f"[{between}" * 20_000 + "]" * 20_000
    path = tmp_path / name
    path.write_text('{"file_name": "00.png", "text": "[[\\"{{"}\n' * 99 + f'{{"file_name": "00.png", "text": {deep}}}')
    source = path.parent if path.parent.name == "pictures" else path
    told = refused(capsys, source, "--output_dir", tmp_path / "out")
    assert f"{path}, line {199 if between else 100}: JSON nested more than 100 levels deep" in told
