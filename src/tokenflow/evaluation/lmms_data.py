"""Which data sets lmms-eval's tasks need, and whether they can be had here; run in lmms-eval's environment.

    python -m tokenflow.evaluation.lmms_data '{"tasks": ["pope"], "include_path": null}'

prints, as its last line, JSON: for each task the data set, its configurations, and the reason why it cannot
be loaded, or null. lmms-eval itself would find out late, after minutes of retries.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import datasets
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

# Loaded by the code of the task, beside what its file names.
_MORE_CONFIGURATIONS = {"gqa": ["testdev_balanced_images"]}


def inspect(task: str, manager: TaskManager) -> dict[str, Any]:
    """`{"dataset": name, "configurations": [...], "problem": one line or None}` of a task."""
    if task not in manager.all_subtasks:
        return {"dataset": None, "configurations": [], "problem": f"lmms-eval has no task {task!r}"}
    config = load_yaml_config(manager.task_index[task]["yaml_path"], mode="simple")
    path, options = config["dataset_path"], dict(config.get("dataset_kwargs") or {})
    names = [config.get("dataset_name"), *_MORE_CONFIGURATIONS.get(task, [])]
    found = {"dataset": path, "configurations": [name for name in names if name], "problem": None}
    try:
        for name in names:
            if options.get("load_from_disk"):
                datasets.load_from_disk(path)
            else:
                datasets.load_dataset_builder(path, name, **options)  # reads no pictures
    except Exception as error:  # of many kinds: no network, no such name, not logged in, damaged
        found["problem"] = (str(error) or type(error).__name__).splitlines()[0]
    return found


def main() -> None:
    asked = json.loads(sys.argv[1])
    manager = TaskManager("ERROR", include_path=asked["include_path"])
    print("\n" + json.dumps({task: inspect(task, manager) for task in asked["tasks"]}))


if __name__ == "__main__":
    main()
