"""One training on two hosts, over a network: its processes share the model, and come to what one process comes to."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.spec import Progress, no_progress

PATIENCE_S = 300.0


@pytest.mark.slow
def test_a_training_runs_on_two_hosts(hosts):
    hosts.start()
    call = [
        "-m",
        "tests.faults.test_training_hosts",
        "--address",
        hosts.address,
        "--folder",
        str(hosts.folder / "work"),
    ]
    with hosts.call(0, *call, stdout=subprocess.PIPE) as driver:
        try:
            answer, _ = driver.communicate(timeout=PATIENCE_S)
        finally:
            driver.kill()
    assert driver.returncode == 0, hosts.log(0)
    found = json.loads(answer.splitlines()[-1])
    assert found["error"] is None
    assert found["addresses"] == ["10.99.0.2", "10.99.0.3"]
    assert found["difference"] < 2e-3


def gather_addresses(progress: Progress) -> dict[str, Any]:
    """On which host each process of a group runs."""
    import ray
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, ray.util.get_node_ip_address())
    return {"addresses": sorted(found)}


def drive(address: str, folder: Path) -> dict[str, Any]:
    """Train a tiny story model here by itself, and on the cluster in two processes."""
    from safetensors.torch import load_file

    from stages.cluster import RayExecutor
    from stages.engine import Engine, Work
    from stages.train_autoregressive import SPEC
    from stages.training_processes import run_processes
    from stages.worker import WorkerSettings
    from storage.artifacts import Artifact, content_digest
    from storage.catalog import Catalog
    from storage.objects import ObjectStore
    from tests.stages.tiny_story_model import make_config, make_rows, train, write_rows, write_trunk

    folder.mkdir()
    trunk, table = write_trunk(folder / "trunk"), write_rows(folder, make_rows())
    train(make_config(trunk, micro_batches=2), table, folder / "one")
    store = ObjectStore(str(folder / "objects"), folder / "cache")
    files = tuple(store.put(path, path.name) for path in sorted(table.iterdir()))
    tokens = Artifact("tokens-x", "tokens", "set", "f", content_digest(files), {}, files, ())
    config = make_config(trunk, micro_batches=2, processes=2)
    executor = RayExecutor(WorkerSettings(store.uri, folder / "scratch", None), address, None)
    found = run_processes(gather_addresses, 2, 1.0, folder, no_progress)
    engine = Engine(Catalog(f"sqlite:///{folder / 'catalog.sqlite'}"), store, executor)
    work = Work(SPEC, config, "set", {"tokens": [tokens]}, {})
    ((_, _, result, _),) = executor.run(SPEC, config, [(work, engine.plan_units(work)[0])], lambda *told: None)
    executor.close()
    found["error"] = result.error
    if result.error is None:
        made = load_file(store.path(next(file for file in result.files if file.name == "model.safetensors")))
        alone = load_file(folder / "one" / "out" / "model.safetensors")
        found["difference"] = max(float((made[name] - alone[name]).abs().max()) for name in alone)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--address")
    parser.add_argument("--folder", type=Path)
    call = parser.parse_args()
    sys.stdout.write(json.dumps(drive(call.address, call.folder)) + "\n")
