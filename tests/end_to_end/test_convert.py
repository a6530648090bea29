"""`persimmon convert` at the console: its result can be served, and what is wrong is one line that says what to do."""

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from persimmon import model
from persimmon.model.convert import writer
from persimmon.server.cli import main
from tests.end_to_end.serving import serving
from tests.model.checkpoints import DEMO_END_OF_TEXT
from tests.model.convert.adept_layout import as_tar, make_release
from tests.model.convert.placeholders import with_placeholders

DEMO = Path(model.__path__[0]) / "demo"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "persimmon.server.cli", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def same_tensors(out: Path, expected: Path, dtype: torch.dtype) -> bool:
    ours = {name: part for path in out.glob("*.safetensors") for name, part in load_file(path).items()}
    theirs = load_file(expected / "model.safetensors")
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name].to(dtype)) and ours[name].dtype == dtype for name in theirs
    )


def test_pickled_weights_are_converted_in_shards_of_a_type(tmp_path):
    source = shutil.copytree(DEMO, tmp_path / "in", ignore=shutil.ignore_patterns("*.safetensors", "*.py"))
    torch.save(load_file(DEMO / "model.safetensors"), source / "pytorch_model.bin")
    out = tmp_path / "new" / "out"
    ended = run(source, out, "--dtype", "bfloat16", "--max-shard-size", "4MB")
    assert ended.returncode == 0, ended.stderr
    assert len(list(out.glob("model-*-of-*.safetensors"))) >= 4
    assert ended.stderr.count("written and verified") == len(list(out.glob("*.safetensors")))
    assert f"persimmon serve --model {out}" in ended.stderr
    assert same_tensors(out, DEMO, torch.bfloat16)


def answer(url: str) -> str:
    body = {"model": "persimmon-demo", "prompt": "a dog is", "max_tokens": 24, "temperature": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    response.raise_for_status()
    return str(response.json()["choices"][0]["text"])


def test_adepts_release_is_converted_and_answers_like_the_original(demo, tmp_path):
    release = as_tar(make_release(DEMO, tmp_path / "8b_base_model_release", ranks=2))
    out = tmp_path / "out"
    ended = run("--from-adept", release, out)
    assert ended.returncode == 0, ended.stderr
    assert same_tensors(out, DEMO, torch.float16)
    with serving(
        "--model", str(out), "--served-model-name", "persimmon-demo", "--kv-cache-memory", "64MB"
    ) as converted:
        assert answer(converted.url) == answer(demo.url)


def test_a_terminal_shows_a_progress_bar(tmp_path):
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 110, 0, 0))
    command = [sys.executable, "-m", "persimmon.server.cli", "convert", str(DEMO), str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while b"Done" not in shown:
            shown += os.read(master, 4096)
        assert process.wait(timeout=60) == 0
    os.close(master)
    assert re.search(rb"\r  model\.safetensors: +\d+%\|", shown)


def test_control_c_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    arguments = ["convert", str(DEMO), str(tmp_path / "out"), "--max-shard-size", "4MB"]
    write_shard, written = writer._write_shard, iter(range(1))

    def interrupted(*given):
        if next(written, None) is None:
            raise KeyboardInterrupt
        write_shard(*given)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", interrupted)
        assert main(arguments) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert main(arguments) == 0
    assert re.search(r"model-00001-of-00004\.safetensors  [\d.]+ MiB kept and verified", capsys.readouterr().err)
    assert same_tensors(tmp_path / "out", DEMO, torch.float16)


@pytest.mark.parametrize("flags", [["--trim-vocab"], ["--drop-ids", "5-3000,1-4,3001-4096"]])
def test_unused_rows_of_the_vocabulary_are_dropped(flags, tmp_path, capsys):
    source = with_placeholders(DEMO, tmp_path / "in", 4096)
    assert main(["convert", *flags, str(source), str(tmp_path / "out")]) == 0
    assert "dropping 4,096 of 8,192 token ids" in capsys.readouterr().err
    assert same_tensors(tmp_path / "out", DEMO, torch.float16)


def test_a_trimmed_checkpoint_answers_in_the_ids_of_the_whole_vocabulary(tmp_path):
    whole = with_placeholders(DEMO, tmp_path / "whole", 48)
    trimmed = tmp_path / "trimmed"
    assert main(["convert", "--trim-vocab", str(whole), str(trimmed)]) == 0
    dropped, kept = DEMO_END_OF_TEXT + 7, DEMO_END_OF_TEXT + 48 + 300
    asked = {
        "prompt": "human: What is a persimmon?\n\nadept:",
        "temperature": 0,
        "max_tokens": 24,
        "n": 2,
        "logprobs": 3,
        "echo": True,
        "return_token_ids": True,
        "logit_bias": {str(kept): 100 / 7},
        "frequency_penalty": 0.5,
    }
    refused = [{"prompt": [[kept], [dropped]], "max_tokens": 1}, {"prompt": "a", "logit_bias": {str(dropped): 1}}]
    requests = [
        *(("/v1/completions", body) for body in refused),
        ("/v1/completions", asked),
        (
            "/v1/completions",
            {"prompt": [kept + 1, kept], "max_tokens": 9, "stop_token_ids": [kept], "top_k": 9, "seed": 4},
        ),
        ("/v1/completions", {"prompt": "It is", "structured_outputs": {"regex": "(yes|no)!"}, "seed": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "What is a plum?"}], "temperature": 0}),
        ("/tokenize", {"prompt": "What is a plum?"}),
        ("/detokenize", {"tokens": [kept, kept + 1]}),
    ]

    def answers(folder: Path) -> list[httpx.Response]:
        with serving("--model", str(folder), "--served-model-name", "m", "--kv-cache-memory", "64MB") as server:
            return [httpx.post(server.url + path, json=body, timeout=60) for path, body in requests]

    for (path, body), theirs, ours in zip(requests, answers(whole), answers(trimmed), strict=True):
        if body in refused:
            assert ours.status_code == 400, ours.text
            assert f"the token id {dropped} ('|7|'), which is not in this checkpoint's trimmed vocabulary" in ours.text
            continue
        assert (theirs.status_code, ours.status_code) == (200, 200), theirs.text + ours.text
        expected, answer = theirs.json(), ours.json()
        for changing in ("id", "created"):
            expected.pop(changing, None), answer.pop(changing, None)
        figures = [
            choice["logprobs"].pop(figure)
            for content in (expected, answer)
            for choice in content.get("choices", [])
            if choice.get("logprobs")
            for figure in ("token_logprobs", "top_logprobs")
        ]
        assert answer == expected, (path, body)
        half = len(figures) // 2
        # The dropped rows had a small share of the probability.
        for one, other in zip(figures[:half], figures[half:], strict=True):
            for before, after in zip(one[1:], other[1:], strict=True):
                assert after == pytest.approx(before, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing-here/", "out"], "nothing-here"),
        (["--trim-vocab", str(DEMO), "out"], "nothing to trim"),
        (["--from-adept", "nothing-here.tar", "out"], "nothing-here.tar"),
        (["--from-adept", str(DEMO), "out"], "mp_rank_00"),
        (["--from-gguf", "nothing-here.gguf", "out"], "nothing-here.gguf"),
        (["--from-gguf", str(DEMO / "tokenizer.json"), "out"], "not a GGUF file"),
        (["--from-openvino", "nothing-here/", "out"], "nothing-here"),
        (["--from-openvino", str(DEMO), "out"], "openvino_model.xml"),
        ([str(DEMO), "."], "not empty"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["convert", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("persimmon: error: ")
    assert named in line


@pytest.mark.parametrize("others", ["--from-gguf", "--from-openvino"])
def test_a_checkpoint_has_one_layout(others, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(DEMO), "out", "--from-adept", others])
    assert f"{others}: not allowed with argument --from-adept" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-5GB", "many"])
def test_a_size_that_is_none_is_named(size, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(DEMO), "out", f"--max-shard-size={size}"])
    assert f"'{size}' is not a valid size" in capsys.readouterr().err


@pytest.mark.parametrize("ids", ["", "all", "3-", "-3", "5-3", "1,,2", "1-2-3", "²", "999999999"])
def test_ids_that_are_none_are_named(ids, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(DEMO), "out", f"--drop-ids={ids}"])
    assert "expected one like 3-70002" in capsys.readouterr().err


def test_ids_are_found_or_named_but_not_both(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(DEMO), "out", "--trim-vocab", "--drop-ids=3-9"])
    assert "not allowed with" in capsys.readouterr().err
