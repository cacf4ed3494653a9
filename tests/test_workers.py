"""Jobs side by side: what each has to itself, and the command that runs one alone."""

import os
from pathlib import Path

import pytest
from conftest import ROOT, small_config
from hypothesis import given
from hypothesis import strategies as st

from chargpt import workers
from chargpt.config import Config
from chargpt.space import compose_config


@given(st.integers(1, 20), st.integers(1, 20))
def test_places_share_everything_out_and_nobody_has_nothing(things: int, places: int) -> None:
    shares = [workers.share(range(things), place, places) for place in range(places)]
    assert all(shares)
    given_out = [thing for share in shares for thing in share]
    if places <= things:
        assert sorted(given_out) == list(range(things))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    else:
        counts = [given_out.count(thing) for thing in range(things)]
        assert max(counts) - min(counts) <= 1


def test_the_gpus_are_those_that_the_driver_lists_or_the_user_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'\necho 'GPU 1: H100 (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert workers.gpus() == []
    monkeypatch.delenv("JAX_PLATFORMS")
    assert workers.gpus() == ["0", "1"] and workers.jobs_at_once() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,GPU-7")
    assert workers.gpus() == ["3", "5", "GPU-7"] and workers.jobs_at_once() == 3
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert workers.gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.unlink()
    assert workers.gpus() == [] and 1 <= workers.jobs_at_once() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("name", ["mla kv_lora_rank=8", "it's", 'a "b" \\', "{x: [1]}, y"])
@pytest.mark.parametrize("group", ["a sweep", None])
def test_a_job_alone_has_the_configuration_that_it_has_in_its_sweep(name: str, group: str | None) -> None:
    import dataclasses

    settings = small_config("seed=3", "model.mha_type=mla")
    settings = dataclasses.replace(settings, wandb=dataclasses.replace(settings.wandb, name=name, group=group))
    typed = ["seed=3", "model.mha_type=mla", "wandb.name=typed", "launcher=joblib"]
    arguments = workers.alone(settings, Path("multirun/a b/0_it's"), typed)
    assert arguments[-2:] == ["hydra.mode=RUN", "hydra.run.dir='multirun/a b/0_it\\'s'"]
    assert "launcher=joblib" not in arguments
    composed: Config = compose_config(tuple(arguments[:-2]))
    assert (composed.wandb, composed.seed, composed.model.mha_type) == (settings.wandb, 3, settings.model.mha_type)


def test_main_is_where_workers_look_for_it() -> None:
    assert workers.MAIN == ROOT / "main.py"
