"""The programs as a person starts them: main.py and chargpt, as processes where that matters."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from programs import DEBUG, LONG, assert_same_run, leaves_of, metrics, run, start, wait_for_step

from chargpt import checkpoint, cli
from chargpt.config import differences, from_plain
from chargpt.run.directory import read_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run directory, standard output) of one debug run, logged offline."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    arguments = ["experiment=debug", "mode=offline", "model.dropout=0.1"]
    # It must report that it compiles, whatever another worker has cached
    out, err = run(*arguments, f"hydra.run.dir={run_dir}", JAX_ENABLE_COMPILATION_CACHE="false")
    assert err == ""
    return run_dir, out


def test_a_run_leaves_all_its_files_and_numbers(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    lines = metrics(run_dir)
    assert [line["trainer/step"] for line in lines] == [5, 10, 15, 20]
    assert [line["trainer/tokens"] for line in lines] == [5 * 128, 10 * 128, 15 * 128, 20 * 128]
    always = {"trainer/seconds", "train/loss", "train/grad_norm", "optim/learning_rate"}
    always |= {"throughput/tokens_per_second", "throughput/mfu"}
    evaluated = {"val/loss", "val/accuracy", "val/bpc"}
    assert all(always <= set(line) for line in lines)
    assert [evaluated <= set(line) for line in lines] == [False, True, False, True]
    summary = json.loads((run_dir / "summary.json").read_text())
    best = min(lines[1]["val/loss"], lines[3]["val/loss"])
    assert summary["best/val_loss"] == best and summary["final/val_loss"] == lines[3]["val/loss"]
    assert summary["mha_type"] == "standard"
    assert summary["kv_cache_bytes_per_token"] == 2 * 2 * 32 * 4
    names = {"best/step", "num_params", "tokens_per_second", "compile_seconds", "train_seconds"}
    assert names | {"device", "dataset", "corpus_sha256", "versions"} <= set(summary)
    assert (run_dir / ".hydra" / "overrides.yaml").is_file()
    assert list((run_dir / "wandb").glob("offline-run-*"))
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "samples.txt").read_text().count("=== step ") == 2
    assert not list(run_dir.rglob("*.tmp"))


def test_config_yaml_is_the_resolved_configuration(finished: tuple[Path, str]) -> None:
    config = read_config(finished[0] / "config.yaml")
    assert config.model.dropout == 0.1 and config.trainer.num_steps == 20
    assert config.wandb.name == "standard dropout=0.1"
    summary = json.loads((finished[0] / "summary.json").read_text())
    header = checkpoint.load(finished[0] / "checkpoints" / "best.eqx")[1]
    assert header.config == config and header.step == summary["best/step"]


def test_what_a_person_reads(finished: tuple[Path, str]) -> None:
    run_dir, out = finished
    expected = ["model.dropout=0.1", "512 bytes per token", "ln V 4.127", "bigram 2.4"]
    expected += ["28,704", "100.0%", str(run_dir), "compiled the training step in"]
    expected += ["best validation loss", "curves.png", "chargpt sample run=", "wandb sync "]
    assert [text for text in expected if text not in out] == []
    assert "\x1b" not in out  # not a terminal: plain lines
    assert max(map(len, out.splitlines())) <= 160


BAD_INPUT = {  # a rule of each kind; test_config.py has them all
    "model.mha_typ=mla": "did you mean model.mha_type?",
    "model.mha_type=selctive": "did you mean selective?",
    "model.mha_type=selective model.qk_norm=true": "write model.qk_norm=false",
    "experiment=debgu": "debug",
    "dataset.name=file dataset.filepath=/nowhere/text": "there is no such file",
    "dataset.seq_len=100000": "the validation split has only 92552 characters",
    "hydra.run.dir=/dev/null/run": "cannot be written",
    "resume=/nowhere": "resume=/nowhere: is not a run directory",
}


@pytest.mark.parametrize("arguments", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments: str, tmp_path: Path) -> None:
    given = {argument.partition("=")[0] for argument in arguments.split()}
    debug = [] if "experiment" in given else ["experiment=debug"]
    place = [] if given & {"hydra.run.dir", "resume"} else [f"hydra.run.dir={tmp_path / 'run'}"]
    out, err = run(*debug, *arguments.split(), *place, code=2)
    assert BAD_INPUT[arguments] in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "compiled" not in out


def test_a_typo_is_reported_before_jax_is_loaded() -> None:
    _, imports = run("model.mha_typ=mla", code=2, PYTHONPROFILEIMPORTTIME="1")
    assert "chargpt.config" in imports and "jaxlib" not in imports


def test_a_directory_that_holds_a_run_is_not_overwritten(finished: tuple[Path, str]) -> None:
    before = (finished[0] / "metrics.jsonl").read_bytes()
    _, err = run(*DEBUG, f"hydra.run.dir={finished[0]}", code=2)
    assert "already holds a run" in err and err.count("\n") == 1
    assert (finished[0] / "metrics.jsonl").read_bytes() == before


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    arguments = ["optimizer.learning_rate=1e30", "optimizer.grad_clip=null"]
    arguments += ["trainer.max_skipped_steps=3"]
    _, err = run(*DEBUG, *arguments, f"hydra.run.dir={tmp_path / 'run'}", code=1)
    assert err.count("\n") == 1 and "not finite in 3 steps in a row" in err and "checkpoint" in err
    assert (tmp_path / "run" / "summary.json").is_file()


INTERRUPTED = [*DEBUG, "model.dropout=0.1", "trainer.precision=bfloat16", "trainer.num_steps=160"]
INTERRUPTED += ["trainer.log_every=10", "trainer.eval_every=40", "trainer.checkpoint_every=20"]
INTERRUPTED += ["model.mha_type=mqa", "dataset.sampling=epochs"]
INTERRUPTED += ["optimizer.name=muon", "optimizer.ema_decay=0.98"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run: Muon and Adam, an average, epochs, dropout, in bfloat16."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(*INTERRUPTED, f"hydra.run.dir={run_dir}")
    return run_dir


def test_a_run_killed_twice_and_resumed_equals_one_that_was_not(
    tmp_path: Path, reference: Path
) -> None:
    run_dir = tmp_path / "run"
    begin, resume = [*INTERRUPTED, f"hydra.run.dir={run_dir}"], [f"resume={run_dir}"]
    for arguments, step in ((begin, 50), (resume, 100)):
        process = start(*arguments)
        wait_for_step(process, run_dir, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    out, _ = run(*resume)
    assert "resuming" in out
    assert_same_run(run_dir, reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_saves_summarises_and_exits_with_its_code(
    number: signal.Signals, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(*LONG, f"hydra.run.dir={run_dir}")
    wait_for_step(process, run_dir, 20)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number and err == ""
    step = json.loads((run_dir / "summary.json").read_text())["final/step"]
    last = checkpoint.load(run_dir / "checkpoints" / "last.eqx")[1]
    assert last.step == step == metrics(run_dir)[-1]["trainer/step"]
    assert (run_dir / "curves.png").is_file() and f"python main.py resume={run_dir}" in out


def test_a_resumed_run_takes_a_longer_num_steps_and_refuses_another_model(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    _, err = run(f"resume={run_dir}", "model.d_model=64", code=2)
    refused = "model.d_model: is 32 in that run and cannot become 64"
    assert err == f"error: {refused}; start another run, or leave model.d_model=32\n"
    out, _ = run(f"resume={run_dir}", "trainer.num_steps=30", "mode=disabled")
    assert "trainer.num_steps: 20 -> 30" in out
    assert [line["trainer/step"] for line in metrics(run_dir)] == [5, 10, 15, 20, 25, 30]
    seconds = [line["trainer/seconds"] for line in metrics(run_dir)]
    assert seconds == sorted(seconds)


def test_a_damaged_last_checkpoint_is_reported_and_the_one_before_is_used(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    expected = leaves_of(run_dir)
    last = run_dir / "checkpoints" / "last.eqx"
    last.write_bytes(last.read_bytes()[:-1000])
    out, _ = run(f"resume={run_dir}", "mode=disabled")
    assert "is damaged or incomplete" in out and "at step 10" in out
    assert leaves_of(run_dir) == expected


def tool(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0
) -> tuple[str, str]:
    """(standard output, standard error) of `chargpt …`, run in this process."""
    assert cli.run_tool([*map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return out, err


def test_chargpt_sample_writes_only_the_text_to_standard_output(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", f"run={finished[0]}", "prompt=HAMLET:", "num_chars=100", "seed=3"]
    out, err = run(*arguments, module=True)
    assert out.startswith("HAMLET:") and len(out) == len("HAMLET:") + 100 + 1
    assert "KV cache 16,384 bytes per sample" in err
    assert tool(capsys, *arguments)[0] == out
    greedy = [tool(capsys, *arguments, "temperature=0", f"seed={seed}")[0] for seed in (1, 2)]
    assert greedy[0] == greedy[1] != out


def test_chargpt_evaluate_repeats_the_run_and_counts_unknown_characters(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = tool(capsys, "evaluate", f"run={finished[0]}")
    config = read_config(finished[0] / "config.yaml")
    # The run evaluates a part of the split, the tool all of it
    assert differences(config)["trainer.eval_tokens"] == 2048
    best = json.loads((finished[0] / "summary.json").read_text())["best/val_loss"]
    assert abs(float(out.split()[1]) - best) < 0.05
    (tmp_path / "text").write_text("To be, or not to be: 12345 = that is the question.\n" * 5)
    text = ["dataset.name=file", f"dataset.filepath={tmp_path / 'text'}"]
    out, err = tool(capsys, "evaluate", f"run={finished[0]}", *text)
    assert "30 characters ('1' x 5" in err and "'=' x 5" in err
    assert np.isfinite(float(out.split()[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sampel", "did you mean sample?"),
        ("sample run=/nowhere", "there is no such directory"),
        ("sample promt=x", "did you mean prompt?"),
        ("sample prompt=", "is empty"),
        ("sample temperature=-1", "[0, inf)"),
        ("sample top_p=1.5", "(0, 1]"),
        ("sample top_k=0", "must be at least 1"),
        ("sample num_chars=many", "is not a whole number"),
        ("sample checkpoint=bset", "did you mean best?"),
        ("sample", "there is none in outputs/ or multirun/"),
    ],
)
def test_bad_input_to_a_tool_is_one_clear_line(
    arguments: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = tool(capsys, *arguments.split(), code=2)
    assert message in err and err.count("\n") == 1 and out == ""


def test_an_unknown_character_in_the_prompt_is_named(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = tool(capsys, "sample", f"run={finished[0]}", "prompt=A=B", code=2)
    assert err.startswith("error: prompt: not in the vocabulary: '='")


def test_a_saved_configuration_round_trips_through_json(finished: tuple[Path, str]) -> None:
    with open(finished[0] / "checkpoints" / "last.eqx", "rb") as file:
        saved = json.loads(file.readline())["config"]
    assert from_plain(saved) == read_config(finished[0] / "config.yaml")
