"""Runs in object storage: a real S3 server on loopback, machines that lose their mirror, and commits that race."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest

from pipeline import storage
from pipeline.artifacts import Artifact
from pipeline.catalog import artifacts_of
from pipeline.errors import BusyError, InputError, StorageError

BUCKET = "bucket"


@dataclass
class Cloud:
    """An S3 server, and the environment of those who use it."""

    environment: dict[str, str]

    def names(self, prefix: str = "") -> list[str]:
        key = self.environment["AWS_ACCESS_KEY_ID"]
        client = boto3.client(
            "s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], region_name="us-east-1", aws_access_key_id=key,
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory, free_port):
    log = tmp_path_factory.mktemp("s3") / "log"
    environment = {
        "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port}",
    }  # fmt: skip
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(free_port)], stdout=said, stderr=said,
            env=os.environ | environment,
        )  # fmt: skip
    try:
        for _ in range(240):
            with suppress(OSError), urllib.request.urlopen(environment["AWS_ENDPOINT_URL"]):
                break
            time.sleep(0.25)
        request = urllib.request.Request(f"{environment['AWS_ENDPOINT_URL']}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()
        yield Cloud(environment)
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture
def machine(desk, cloud, server):
    """Starts `rlhf` on a machine of its own: with a mirror that nobody else has."""

    def start(name, *words):
        own = cloud.environment | {"RLHF_MIRRORS": str(desk.folder / name), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *words], cwd=desk.folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | own | {"PREFECT_API_URL": server, "COLUMNS": "200"},
        )  # fmt: skip

    return start


def said_by(process, code=0):
    told, _ = process.communicate(timeout=300)
    assert process.returncode == code, told
    return told


def made_in(folder):
    made = (one for run in sorted(folder.iterdir()) for one in artifacts_of(run))
    return {one.path.relative_to(folder).as_posix(): one for one in made}


def test_a_run_in_object_storage_is_killed_and_another_machine_goes_on(desk, machine, cloud):
    said_by(machine("none", "run", "small.toml", "--root", "whole"))
    whole = made_in(desk.folder / "whole")
    words = ("run", "small.toml", "--root", f"s3://{BUCKET}/runs")
    first = machine("first", *words)
    for _ in range(1200):
        if f"runs/small/0000/policy/{storage.MANIFEST}" in cloud.names("runs/small/0000/policy"):
            break
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    shutil.rmtree(desk.folder / "first")
    said_by(machine("second", *words))
    found = made_in(desk.folder / "second" / "s3" / BUCKET / "runs")
    assert found.keys() == whole.keys()
    for name, artifact in whole.items():
        assert found[name].manifest.digest == artifact.manifest.digest, name
    kept = {name.rpartition("/")[0] for name in cloud.names() if name.endswith(storage.MANIFEST)}
    assert kept == {f"runs/{name}" for name in whole}
    assert {"runs/small/experiment.toml", "runs/small/report.html", "runs/small/promoted.link"} <= set(cloud.names())
    # A third machine has nothing but the URL.
    told = said_by(machine("third", "status", f"s3://{BUCKET}/runs/small"))
    assert "0001" in told and "missing" not in told
    sql = ("sql", f"s3://{BUCKET}/runs/small", "SELECT count(*) FROM rollouts WHERE iteration = 1")
    rows = sum(one.stats["rows"] for name, one in whole.items() if name.startswith("small/0001/rollouts-"))
    assert f" {rows:.0f} " in said_by(machine("third", *sql))
    assert not list((desk.folder / "third").rglob("*.safetensors")), "weights come when they are read"
    said_by(machine("third", "verify", f"s3://{BUCKET}/runs/small/0001/policy"))
    assert list((desk.folder / "third").rglob("*.safetensors"))
    # What is done again or pruned there is so for everybody.
    said_by(machine("third", "redo", f"s3://{BUCKET}/runs/small", "0001/labels-0", "--iteration", "1"), code=2)
    said_by(machine("third", "redo", f"s3://{BUCKET}/runs/small", "label", "--iteration", "1"))
    assert any(name.startswith("runs/small/.replaced/0001/labels-0-") for name in cloud.names())
    said_by(machine("third", "prune", f"s3://{BUCKET}/runs/small", "--keep", "1"))
    assert not [name for name in cloud.names("runs/small/0000/policy") if name.endswith(storage.WEIGHTS)]
    assert not cloud.names("runs/small/.replaced")
    said_by(machine("fourth", "show", f"s3://{BUCKET}/runs/small/0000/policy"))
    assert Artifact.open(desk.folder / "fourth" / "s3" / BUCKET / "runs/small/0000/policy").pruned


@pytest.fixture
def away(tmp_path):
    """Where no other test looks for runs: what lies there are no manifests."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    return tmp_path / "far" / "away"


@pytest.fixture
def mirrored(away, monkeypatch):
    """A folder as object storage, and the path that mirrors it."""
    monkeypatch.setenv(storage.MIRRORS, str(away / "mirrors"))
    (away / "store").mkdir()
    return away / "store", storage.place(f"file://{away}/store/run")


def put_together(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_path_is_a_path_and_a_url_its_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv(storage.MIRRORS, str(tmp_path))
    assert storage.place("runs/a") == Path("runs/a")
    assert storage.url_of(Path("runs/a")) is None
    assert storage.place("s3://bucket/runs/") == tmp_path / "s3/bucket/runs"
    assert storage.url_of(tmp_path / "s3/bucket/runs/small") == "s3://bucket/runs/small"
    assert storage.url_of(storage.place("file:///data/runs")) == "file:///data/runs"


@pytest.mark.parametrize("text", ["s4://bucket/runs", "s3://", "://x"])
def test_a_url_that_nobody_reads_is_refused(text):
    with pytest.raises(InputError, match="write a path, or a URL"):
        storage.place(text)


def test_without_a_manifest_there_is_no_artifact(mirrored):
    store, path = mirrored
    put_together(store / "run" / "labels", part="1")
    assert not storage.there(path / "labels")
    assert not (path / "labels").exists()


def test_of_two_who_commit_the_second_is_told(mirrored, away):
    store, path = mirrored
    storage.publish(put_together(away / "one", manifest__json="1", part="1"), path / "labels")
    with pytest.raises(BusyError, match="another process committed first"):
        storage.publish(put_together(away / "two", manifest__json="2", part="1"), path / "labels")
    assert (store / "run/labels/manifest.json").read_text() == "1"


def test_weights_are_fetched_when_the_artifact_is_completed(mirrored, away):
    _, path = mirrored
    storage.publish(
        put_together(away / "one", manifest__json="1", config__json="2", model__safetensors="3"), path / "policy"
    )
    assert storage.there(path / "policy")
    assert sorted(file.name for file in (path / "policy").iterdir()) == ["config.json", "manifest.json"]
    storage.complete(path / "policy", ["config.json", "model.safetensors"])
    assert (path / "policy/model.safetensors").read_text() == "3"


def test_a_run_is_brought_with_its_links_and_what_is_here_is_left(mirrored):
    store, path = mirrored
    put_together(store / "run/0000/labels", manifest__json="1", part="2")
    put_together(path, experiment__toml="a = 1", __lock="")
    (path / "promoted").symlink_to("0000/policy")
    storage.carry(path)
    assert sorted(file.name for file in (store / "run").iterdir()) == ["0000", "experiment.toml", "promoted.link"]
    shutil.rmtree(path)
    storage.bring(path)
    assert (path / "promoted").readlink() == Path("0000/policy")
    assert (path / "experiment.toml").read_text() == "a = 1"
    (path / "0000/labels/part").write_text("mine")
    storage.bring(path)
    assert (path / "0000/labels/part").read_text() == "mine", "artifacts do not change"


def test_what_is_moved_and_deleted_here_is_moved_and_deleted_there(mirrored):
    store, path = mirrored
    storage.publish(put_together(path / "labels", manifest__json="1", part="2"), path / "labels")
    (path / "labels").rename(path / "old")
    storage.moved(path / "labels", path / "old")
    assert sorted(file.name for file in (store / "run").rglob("*") if file.is_file()) == ["manifest.json", "part"]
    assert not (store / "run/labels").exists()
    storage.removed(path / "old")
    assert not (store / "run/old").exists()


def test_a_store_that_does_not_answer_is_an_error_of_ours(tmp_path, monkeypatch, free_port):
    monkeypatch.setenv(storage.MIRRORS, str(tmp_path))
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port + 1}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_MAX_ATTEMPTS": "1", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=r"s3://nowhere/runs/labels[\s\S]*check address and credentials"):
        Artifact.open(storage.place("s3://nowhere/runs/labels"))
