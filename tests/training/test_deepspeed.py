"""`--deepspeed` with ZeRO-2 on two gloo processes: the losses of a run without it, resumed and exported.

No dependency: after `DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed` this runs on CPUs.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from same_runs import check_same_log, check_same_weights, torchrun
from sharded_chat import stages

from tokenflow.errors import UserError
from tokenflow.training.sharding import check_deepspeed
from tokenflow.training.understanding import train_understanding
from tokenflow.understanding import load

ZERO2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero2_trains_stops_and_goes_on_as_one_process_without_it(
    language_model, conversations, small_model_folder, tmp_path
):
    names = {"text": language_model, "tower": small_model_folder, "train.parquet": conversations}
    for name, path in names.items():
        (tmp_path / name).symlink_to(path)
    (tmp_path / "zero2.json").write_text(json.dumps(ZERO2))
    script = Path(__file__).with_name("sharded_chat.py")
    torchrun(script, SHARDED_FOLDER=str(tmp_path), DS_ACCELERATOR="cpu")
    for one, two in zip(stages(tmp_path, "one"), stages(tmp_path, "two"), strict=True):
        train_understanding(one)
        check_same_log(Path(one.folder), Path(two.folder))
        states = [load(Path(run.folder) / "export", device="cpu")[0].state_dict() for run in (one, two)]
        check_same_weights(*states)


def test_what_cannot_start_says_why(monkeypatch):
    check_deepspeed(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-build-isolation deepspeed"):
        check_deepspeed("zero2.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="start it with torchrun"):
        check_deepspeed("zero2.json")
