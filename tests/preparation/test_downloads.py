"""Downloads from a server on this machine that fails in every way, and from private addresses."""

import socket
import threading
import time
from importlib import import_module

import pytest

from diffusers_safe.preparation import downloads
from prepared_data import PictureServer, captions, hashes, prepare, web_table, write_table


def test_download_errors_are_counted(server, tmp_path, monkeypatch, capsys):
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
        "no address": 4,
    }
    rows = [{"url": server.url(name), "text": name} for name in names]
    elsewhere = (
        "http://127.0.0.1:9/x.png",
        "ftp://127.0.0.1/x.png",
        None,
        "http://127.0.0.1:65536/",
        "http://[::1]:-1",
    )
    rows += [{"url": url, "text": "elsewhere"} for url in elsewhere]
    start = time.monotonic()
    report = prepare(write_table(tmp_path / "table.parquet", rows), tmp_path / "out", "--timeout", 2, "--retries", 0)
    assert report["dropped"] == expected
    assert report["changed"] == {"redirected": 1}
    assert captions(tmp_path / "out") == ["0.png", "to-1.png", "7.png"]
    assert time.monotonic() - start < 20  # the slow servers are waited for at the same time
    printed = capsys.readouterr().out
    assert (
        f"3  dropped: slow answer (the first: {server.url('mute')})" in printed
        and "3  kept" in printed
        and "1  of those kept: redirected" in printed
    )


def test_temporary_errors_are_tried_again(server, tmp_path):
    table = web_table(tmp_path / "table.csv", server, ["busy-1.png", "cut-2.png", "status-503", "status-404"])
    report = prepare(table, tmp_path / "out", "--retries", 1, "--user_agent", "a test")
    assert report["kept"] == 2 and report["dropped"] == {"HTTP 404": 1, "HTTP 503": 1}
    assert report["examples"]["HTTP 404"] == server.url("status-404")
    assert sorted(server.requests) == ["busy-1.png", "busy-1.png", "cut-2.png", "cut-2.png", "status-404",
                                    "status-503", "status-503"]  # fmt: skip
    assert {headers["User-Agent"] for headers in server.headers} == {"a test"}


def test_cookies_are_not_sent_and_the_user_agent_is(server, tmp_path):
    prepare(web_table(tmp_path / "t.csv", server, [f"cookie-{i}" for i in range(4)]), tmp_path / "out",
            "--concurrency", 1)  # fmt: skip
    assert not any("Cookie" in headers for headers in server.headers)
    assert all(headers["User-Agent"].startswith("diffusers-safe/") for headers in server.headers)


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_shards_do_not_depend_on_the_order_of_answers(server, tmp_path, form):
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


def test_a_network_failure_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(import_module("diffusers_safe.preparation.prepare"), "MAX_UNREACHABLE_HOSTS", 5)
    urls = [f"http://127.0.0.{i}:9/{j}.png" for i in range(1, 6) for j in range(3)]
    few = write_table(tmp_path / "few.csv", [{"url": url, "text": "x"} for url in urls[:12]])
    with pytest.raises(SystemExit, match="no image is left of 12 rows: no connection 12"):
        prepare(few, tmp_path / "few", "--retries", 0)
    table = write_table(tmp_path / "table.csv", [{"url": url, "text": "x"} for url in urls])
    with pytest.raises(SystemExit, match="5 servers in a row cannot be reached, the last .*: is the network down"):
        prepare(table, tmp_path / "out", "--retries", 0)
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.8.8.8", "0.0.0.0", "0"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
        *("169.254.169.254", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "[fe80::1]", "[fc00::1]"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "user:secret@127.0.0.1"),
    ],
)
def test_private_addresses_are_not_requested(server, tmp_path, host):
    url = f"http://{host}:{server.server_address[1]}/0.png"
    table = write_table(tmp_path / "table.csv", [{"url": url, "text": "x"}])
    with pytest.raises(SystemExit, match=r"rows: (private address|no address) 1 \(the first: ") as stop:
        prepare(table, tmp_path / "out", "--retries", 0, private=False)
    assert server.requests == [] and ("private" in stop.value.code or host == "0177.0.0.1")  # httpx refuses this one


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"])
def test_public_addresses_are_public(address):
    assert downloads.is_public(address)


def test_host_names_and_redirects_do_not_lead_into_private_networks(server, tmp_path, monkeypatch):
    """In this test, 127.0.0.1 is a public address and 127.0.0.2 a private one."""
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
        if host == "rebound.example":  # DNS rebinding: another answer after the check
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
        assert report["dropped"] == {"private address": 4} and inside.requests == []
        assert sorted(server.requests) == ["1.png", "4.png", "5.png", "away", "to-5.png"]
        assert {headers["Host"] for headers in server.headers} > {f"public.example:{port}"}
        inside.stopped.set()
        inside.shutdown()
        thread.join()


def test_proxies_are_not_asked_for_private_addresses(server, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", server.url("")[:-1])
    table = write_table(
        tmp_path / "t.csv", [{"url": url, "text": "x"} for url in ("http://10.0.0.1/0.png", "http://localhost/1.png")]
    )
    with pytest.raises(SystemExit, match="private address 2"):
        prepare(table, tmp_path / "out", "--retries", 0, private=False)
    assert server.requests == []
