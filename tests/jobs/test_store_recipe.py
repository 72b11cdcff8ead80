"""Recipes, pictures and the doctor in an object store."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from object_store import SECRET, Swift
from wavemill.jobs.doctor_root import check_root
from wavemill.storage.codes import open_stream
from wavemill.storage.root import Root
from wavemill.tokenizers.spec import UserError

SMALL = b"""
corpus: {sources: [recordings]}
codebooks: [{tokenizer: mfcc-kmeans, size: 8}]
streams: {semantic: {tokenizer: mfcc-kmeans}}
tokenize: {engine: inline}
"""
InProcess = Callable[..., CompletedProcess[str]]


@pytest.mark.slow
def test_a_recipe_in_a_store_counts_its_paths_from_there(on_swift: Swift, in_process: InProcess, samples: Path):
    place = Root(f"s3://{on_swift.bucket()}/lab")
    for found in (samples / "speech").glob("en_anna_0[12].*"):  # with their transcripts
        place.write_bytes(f"recordings/{found.name}", found.read_bytes())
    recipe = f"{place}/recipe.yaml"
    assert in_process("recipe", "init", recipe).returncode == 0
    twice = in_process("recipe", "init", recipe)
    assert twice.returncode == 2
    assert "is there already" in twice.stderr
    assert in_process("recipe", "init", recipe, "--force").returncode == 0
    checked = in_process("recipe", "check", recipe, "--json")
    assert checked.returncode == 0, checked.stderr
    place.write_bytes("small.yaml", SMALL)
    built = in_process("run", f"{place}/small.yaml")
    assert built.returncode == 0, built.stderr
    assert open_stream(Root(f"{place}/tokens"), "semantic").num_rows == 2
    missing = in_process("recipe", "check", f"{place}/none.yaml")
    assert missing.returncode == 2
    assert "There is no recipe" in missing.stderr


def test_a_picture_goes_into_a_store(on_swift: Swift, in_process: InProcess, finished_root: Path):
    pytest.importorskip("matplotlib")
    place = Root(f"s3://{on_swift.bucket()}/reports")
    done = in_process("inspect", finished_root, "--png", f"{place}/use.png")
    assert done.returncode == 0, done.stderr
    assert place.read_bytes("use.png").startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_doctor_tries_a_store_and_leaves_nothing(on_swift: Swift):
    bucket = on_swift.bucket()
    checks = {check.name: check for check in check_root(f"s3://{bucket}/data")}
    assert {check.status for check in checks.values()} == {"ok"}, checks
    assert {"root's parts", "root's commits", "root's tables", "root's clock"} <= set(checks)
    assert Root(f"s3://{bucket}").list("") == []
    assert on_swift.endpoint in checks["root"].found
    assert SECRET not in json.dumps([check.to_json() for check in checks.values()])
    refused = check_root("s3://no-such-bucket-here/data")[0]
    assert refused.status == "fail"
    assert "no such bucket" in refused.found
    with pytest.raises(UserError, match="no such bucket"):
        Root("s3://no-such-bucket-here/data").require_writable()


@pytest.mark.slow
def test_the_doctor_sees_that_a_store_lets_two_create_one_object(on_swift: Swift):
    bucket = on_swift.bucket()
    with on_swift.environment(AWS_ENDPOINT_URL=on_swift.racing_endpoint):
        checks = {check.name: check for check in check_root(f"s3://{bucket}/data")}
    assert checks["root's commits"].status == "warn"
    assert "conditional creation is not atomic" in checks["root's commits"].found
    assert "root's tables" not in checks
