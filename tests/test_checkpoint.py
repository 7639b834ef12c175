"""Tests what Orbax keeps, returns and refuses."""

import json
import math
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.experimental import multihost_utils
from small_runs import metadata_of

from jaxii import manifest
from jaxii.distributed.mesh import make_mesh, replicated
from jaxii.errors import InputError
from jaxii.manifest import File, Manifest
from jaxii.train import checkpoint_manager
from jaxii.train.checkpoint import (
    CheckpointMetadata,
    Checkpoints,
    FailedSave,
    evaluated_params,
)
from jaxii.train.optimizer import OPTIMIZERS, make_optimizer
from jaxii.train.stages import ENTERS_FROM, BatchSize, Saved, choose
from jaxii.train.state import new_state


def make_state(name="sgd", value=1.0, with_average=True, mesh=None):
    params = {"trunk": {"kernel": jnp.full((3, 2), value), "bias": jnp.zeros(2)}}
    optimizer = make_optimizer(
        name=name,
        schedule=optax.constant_schedule(0.1),
        weight_decay=1e-4,
        clip_norm=1.0,
    )
    state = new_state(
        params=params,
        batch_stats={"trunk": {"mean": jnp.arange(2, dtype=jnp.float32)}},
        optimizer=optimizer,
        step=7,
        with_average=with_average,
    )
    return jax.device_put(state, replicated(mesh or make_mesh()))


def like(state, mesh):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        state,
    )


def blank(state):
    """Overwrites a state. It reads the whole state, so that all buffers are donated."""
    return jax.tree.map(lambda x: x - x, state)


def saved(step, metric=None, **more):
    return Saved(stage="first", step=step, first_step=0, metric=metric, **more)


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path, ["first", "second"], "0123456789abcdef")
    yield made
    made.close()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_leaf_comes_back_on_another_number_of_devices(checkpoints, name):
    state = make_state(name)
    checkpoints.save(metadata_of(saved(7)), state)
    mesh = make_mesh(jax.devices()[:1])
    (found,) = checkpoints.saved()["first"]
    restored = checkpoints.restore_state(found, like(state, mesh))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding == replicated(mesh)
        np.testing.assert_array_equal(a, b)


def test_a_state_without_an_average_comes_back_without_one(checkpoints):
    state = make_state(with_average=False)
    checkpoints.save(metadata_of(saved(7)), state)
    (found,) = checkpoints.saved()["first"]
    assert (
        checkpoints.restore_state(found, like(state, make_mesh())).average_params
        is None
    )


def test_the_model_comes_back_without_knowing_the_optimizer(checkpoints):
    state = make_state("lamb")
    checkpoints.save(metadata_of(saved(7)), state)
    (found,) = checkpoints.saved()["first"]
    model = checkpoints.restore_model(found, replicated(make_mesh(jax.devices()[:1])))
    assert set(model) == {"params", "batch_stats", "average_params"}
    np.testing.assert_array_equal(
        model["params"]["trunk"]["kernel"], state.params["trunk"]["kernel"]
    )


def test_a_save_does_not_move_the_step_at_which_jax_would_stop(
    checkpoints, monkeypatch
):
    asked = []

    def reached(step):
        asked.append(step)
        return False

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
    checkpoints.save(metadata_of(saved(7)), make_state())
    checkpoints.wait()
    assert checkpoints.saved()["first"]
    assert asked == []


def test_the_best_and_the_last_are_kept(checkpoints):
    metrics = {1: 0.3, 2: 0.6, 3: 0.5, 4: 0.4}
    for step, metric in metrics.items():
        checkpoints.save(metadata_of(saved(step, metric)), make_state())
    assert [s.step for s in checkpoints.saved()["first"]] == [2, 4]


@pytest.mark.parametrize(
    "metrics",
    [
        (0.5, 0.5, 0.4),
        (0.5, 0.4, 0.5, 0.3),
        (0.0, 0.0, 0.0),
        (0.3, None, 0.3, None),
        (None, None),
        (0.2, 0.6, 0.6, None, 0.6, 0.1),
        (0.5, math.nan, 0.4),
        (math.nan, 0.5, 0.4),
        (math.nan, math.nan),
    ],
)
def test_what_would_be_chosen_of_all_checkpoints_is_still_on_disk(checkpoints, metrics):
    everything = [saved(step, metric) for step, metric in enumerate(metrics, start=1)]
    for number, one in enumerate(everything, start=1):
        checkpoints.save(metadata_of(one), make_state())
        chosen = {choose(everything[:number], which) for which in ENTERS_FROM}
        steps = {one.step for one in chosen}
        assert {one.step for one in checkpoints.saved()["first"]} == steps


def test_the_best_is_kept_when_the_run_goes_on_in_another_process(
    checkpoints, tmp_path
):
    for step, metric in {1: 0.3, 2: 0.6, 3: 0.5}.items():
        checkpoints.save(metadata_of(saved(step, metric)), make_state())
    checkpoints.close()
    again = Checkpoints(tmp_path, ["first"], "0123456789abcdef")
    again.save(metadata_of(saved(4, 0.4)), make_state())
    again.save(metadata_of(saved(5)), make_state())
    assert [s.step for s in again.saved()["first"]] == [2, 5]
    again.close()


def test_what_a_checkpoint_says_of_itself_comes_back(checkpoints):
    given = saved(4, 0.5, evaluations=((2, 0.25), (4, 0.5)), finished=True)
    file = File(size_bytes=3, xxh3="0" * 32)
    metadata = metadata_of(
        given, provenance={"clean": True}, files={"labels.csv": file}, history=file
    )
    checkpoints.save(metadata, make_state())
    (found,) = checkpoints.saved()["first"]
    assert found == given
    assert checkpoints.metadata(found) == metadata


def test_the_keys_of_the_metadata_are_those_of_earlier_checkpoints():
    assert list(metadata_of(saved(4)).to_json()) == [
        *("provenance", "config_hash", "config", "recipe", "data_hash", "files"),
        *("train_step_compilations", "history", "label_hash"),
        *("stage", "step", "first_step", "example", "first_example"),
        *("metric", "evaluations", "finished"),
    ]


def test_batch_sizes_come_back_and_are_that_of_the_configuration_if_not_given():
    config = {"global_batch_size": 8, "micro_batches": 2}
    sizes = BatchSize(0, 8, 2), BatchSize(5, 4, 1)
    for given, found in (((), sizes[:1]), (sizes, sizes)):
        metadata = metadata_of(saved(6), config=config, batch_sizes=given)
        record = json.loads(json.dumps(metadata.to_json()))
        again = CheckpointMetadata.from_json(record, "a/metadata")
        assert again == metadata
        assert again.all_batch_sizes() == found


@pytest.mark.parametrize(
    ("key", "more", "text"),
    [
        ("recipe", {}, r"does .*\(missing: recipe; unknown: none\)"),
        ("step", {"steps": 4}, r"does .*\(missing: step; unknown: steps\)"),
    ],
)
def test_metadata_with_other_keys_is_refused_by_key(key, more, text):
    record = metadata_of(saved(4)).to_json() | more
    del record[key]
    with pytest.raises(InputError, match=f"a/metadata {text}.* version of jaxii"):
        CheckpointMetadata.from_json(record, "a/metadata")


def test_a_save_that_was_cut_off_does_not_count(checkpoints, tmp_path):
    checkpoints.save(metadata_of(saved(4)), make_state())
    checkpoints.wait()
    folder = tmp_path / "checkpoints" / "first"
    (folder / "5.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path, ["first"], "0123456789abcdef")
    assert [s.step for s in again.saved()["first"]] == [4]
    again.close()


def test_who_only_reads_leaves_a_save_of_another_process_alone(checkpoints, tmp_path):
    checkpoints.save(metadata_of(saved(4)), make_state())
    checkpoints.wait()
    half = tmp_path / "checkpoints" / "first" / "5.orbax-checkpoint-tmp"
    half.mkdir()
    reader = Checkpoints(tmp_path, ["first"], "0123456789abcdef", read_only=True)
    (found,) = reader.saved()["first"]
    reader.restore_model(found, replicated(make_mesh()))
    reader.close()
    assert half.exists()


def test_what_is_half_deleted_does_not_count(checkpoints, tmp_path):
    checkpoints.save(metadata_of(saved(4, 0.5)), make_state())
    checkpoints.save(metadata_of(saved(5, 0.4)), make_state())
    checkpoints.wait()
    (tmp_path / "checkpoints" / "first" / "4" / "metadata" / "metadata").unlink()
    assert [s.step for s in checkpoints.saved()["first"]] == [5]


def test_nothing_is_left_of_a_checkpoint_that_was_replaced(checkpoints, tmp_path):
    for step in (4, 5, 6):
        checkpoints.save(metadata_of(saved(step)), make_state())
    checkpoints.wait()
    folder = tmp_path / "checkpoints" / "first"
    assert [path.name for path in folder.iterdir()] == ["6"]


def test_a_failed_save_is_noticed_without_waiting_and_leaves_the_others(
    checkpoints, tmp_path, monkeypatch
):
    def fail(self, directory):
        raise ValueError("... file 4: No space left on device [os_error_code='28']")

    checkpoints.save(metadata_of(saved(4, 0.5)), make_state())
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "finalize", fail)
        checkpoints.save(metadata_of(saved(5, 0.6)), make_state())
        with pytest.raises(FailedSave, match=r"step 5 .*failed: No space") as raised:
            for _ in range(1000):
                checkpoints.check()
                time.sleep(0.01)
    assert raised.value.last == 4
    checkpoints.wait()
    assert [s.step for s in checkpoints.saved()["first"]] == [4]
    checkpoints.save(metadata_of(saved(6, 0.4)), make_state())
    assert [s.step for s in checkpoints.saved()["first"]] == [4, 6]
    folder = tmp_path / "checkpoints" / "first"
    assert sorted(path.name for path in folder.iterdir()) == ["4", "6"]


def test_a_partial_checkpoint_in_a_bucket_is_not_called_complete(tmp_path, monkeypatch):
    # A local folder that is read like one in a bucket, where saves are not renamed.
    monkeypatch.setattr("jaxii.train.checkpoint.at", epath.Path)
    for step in ("4", "8"):
        (tmp_path / step).mkdir()
    (tmp_path / "4" / "commit_success.txt").touch()
    failure = FailedSave(epath.Path(tmp_path), 8, OSError(28, "No space left"))
    assert failure.last == 4
    assert "continues from step 4, which is complete" in str(failure)


def test_checkpoints_of_other_labels_are_refused(checkpoints, tmp_path):
    checkpoints.save(metadata_of(saved(4)), make_state())
    checkpoints.wait()
    other = Checkpoints(tmp_path, ["first"], "fedcba9876543210")
    with pytest.raises(InputError, match="0123456789abcdef"):
        other.saved()
    other.close()


def test_a_checkpoint_is_not_touched_by_the_steps_that_follow_its_save(checkpoints):
    state = make_state(value=1.0)

    step = jax.jit(blank, donate_argnums=0)
    checkpoints.save(metadata_of(saved(7)), state)
    shapes = like(state, make_mesh())
    step(state)
    (found,) = checkpoints.saved()["first"]
    restored = checkpoints.restore_state(found, shapes)
    np.testing.assert_array_equal(restored.params["trunk"]["kernel"], np.ones((3, 2)))


def test_the_loop_goes_on_while_a_save_is_only_beginning(checkpoints, monkeypatch):
    begun, allowed = threading.Event(), threading.Event()

    def wait_and_save(*given):
        begun.set()
        allowed.wait(60)
        checkpoint_manager.save(*given)

    monkeypatch.setattr("jaxii.train.checkpoint.save", wait_and_save)
    state = make_state(value=1.0)
    shapes = like(state, make_mesh())
    checkpoints.save(metadata_of(saved(7)), state)
    assert begun.wait(60)
    checkpoints.check()
    # The next steps overwrite the buffers before any of them is read.
    jax.jit(blank, donate_argnums=0)(state)
    assert state.params["trunk"]["kernel"].is_deleted()
    allowed.set()
    (found,) = checkpoints.saved()["first"]
    restored = checkpoints.restore_state(found, shapes)
    np.testing.assert_array_equal(restored.params["trunk"]["kernel"], np.ones((3, 2)))


def test_who_ends_with_an_error_can_let_a_save_finish(checkpoints, tmp_path):
    checkpoints.save(metadata_of(saved(7)), make_state())
    checkpoints.finish()
    assert (tmp_path / "checkpoints" / "first" / "7" / "metadata").exists()


def test_a_folder_that_cannot_be_made_is_a_failed_save(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "first").write_text("in the way")
    checkpoints = Checkpoints(tmp_path, ["first"], "0123456789abcdef")
    with pytest.raises(FailedSave, match="step 7 "):
        checkpoints.save(metadata_of(saved(7)), make_state())
        checkpoints.wait()
    checkpoints.close()


def test_there_is_nothing_before_the_first_save(checkpoints):
    assert checkpoints.saved() == {}


def test_the_average_is_what_is_evaluated():
    model = {"params": 1, "average_params": 2, "batch_stats": 3}
    assert evaluated_params(model) == 2
    assert evaluated_params({"params": 1, "batch_stats": 3}) == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda reader, best: reader.restore_model(best, replicated(make_mesh())),
        lambda reader, best: reader.restore_state(
            best, like(make_state(), make_mesh())
        ),
        lambda reader, best: reader.model_shapes(best),
        lambda reader, best: reader.metadata(best),
    ],
    ids=["restore_model", "restore_state", "model_shapes", "metadata"],
)
@pytest.mark.parametrize("verified", [False, True])
def test_a_checkpoint_that_was_replaced_while_it_is_read_is_not_called_damaged(
    checkpoints, tmp_path, read, verified
):
    checkpoints.save(metadata_of(saved(4, 0.6)), make_state())
    checkpoints.wait()
    reader = opened(tmp_path)
    best = reader.best_of()
    if verified:
        reader.restore_state(best, like(make_state(), make_mesh()))
    checkpoints.save(metadata_of(saved(6, 0.8)), make_state())
    checkpoints.wait()
    words = "step 4 of stage first .*was replaced by a newer checkpoint.*run it again"
    with pytest.raises(InputError, match=words):
        read(reader, best)
    reader.close()


# Damage.


def weights_file(folder, step):
    """Returns the largest file of the arrays that evaluation needs."""
    files = (folder / "checkpoints" / "first" / str(step) / "model").rglob("*")
    return max(filter(Path.is_file, files), key=lambda path: path.stat().st_size)


def flip(path):
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    content[np.linspace(0, len(content) - 1, 64).astype(int)] ^= 0x55
    path.write_bytes(content.tobytes())


@pytest.fixture
def two(checkpoints, tmp_path):
    """Checkpoints at steps 2 (the best) and 4, closed; returns the workdir."""
    for step, metric in {2: 0.6, 4: 0.4}.items():
        checkpoints.save(metadata_of(saved(step, metric)), make_state())
    checkpoints.close()
    return tmp_path


def opened(workdir):
    return Checkpoints(workdir, ["first"], "0123456789abcdef", read_only=True)


def test_flipped_bytes_of_weights_are_found_before_they_are_used(two, monkeypatch):
    # As if the file were large: not read at opening.
    monkeypatch.setattr(manifest, "SMALL_BYTES", 0)
    path = weights_file(two, 4)
    flip(path)
    found = opened(two)
    last = found.saved()["first"][-1]
    pattern = f"{path.name} is damaged.*remove it.*from step 2 of stage first.*intact"
    with pytest.raises(InputError, match=pattern):
        found.restore_model(last, replicated(make_mesh()))
    found.restore_model(found.best_of(), replicated(make_mesh()))
    found.close()


def test_a_damaged_checkpoint_that_no_whole_one_precedes_says_so(two, monkeypatch):
    monkeypatch.setattr(manifest, "SMALL_BYTES", 0)
    for step in (2, 4):
        flip(weights_file(two, step))
    found = opened(two)
    with pytest.raises(InputError, match="from a copy, or train again in another"):
        found.restore_model(found.best_of(), replicated(make_mesh()))
    found.close()


@pytest.mark.parametrize("part", ["model", "training", "metadata", "metrics"])
def test_a_file_that_is_missing_from_a_checkpoint_is_named(two, part):
    folder = two / "checkpoints" / "first" / "4" / part
    path = min(filter(Path.is_file, folder.rglob("*")))
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name} is missing"):
        opened(two).saved()


def test_metadata_of_another_checkpoint_is_refused(two):
    steps = two / "checkpoints" / "first"
    name = "metadata/metadata"
    (steps / "4" / name).write_bytes((steps / "2" / name).read_bytes())
    with pytest.raises(
        InputError, match="metadata/metadata is damaged or was replaced"
    ):
        opened(two).saved()


def test_whole_checkpoints_are_opened_without_reading_the_others(two, monkeypatch):
    monkeypatch.setattr(manifest, "SMALL_BYTES", 0)
    read = []
    describe = manifest.describe
    monkeypatch.setattr(
        manifest, "describe", lambda path: read.append(str(path)) or describe(path)
    )
    found = opened(two)
    found.restore_model(found.best_of(), replicated(make_mesh()))
    found.close()
    assert read and all("/first/2/model/" in path for path in read)


def test_a_checkpoint_has_its_manifest_before_it_has_its_name(two):
    for step in ("2", "4"):
        folder = two / "checkpoints" / "first" / step
        listed = Manifest.load(folder / manifest.NAME, fix="")
        files = {
            path.relative_to(folder).as_posix()
            for path in filter(Path.is_file, folder.rglob("*"))
        }
        expected = files - {manifest.NAME} - checkpoint_manager.NOT_LISTED
        assert set(listed.files) == expected
        times = [(folder / name).stat().st_mtime_ns for name in listed.files]
        assert max(times) <= (folder / manifest.NAME).stat().st_mtime_ns
        renamed = (folder / "commit_success.txt").stat().st_mtime_ns
        assert (folder / manifest.NAME).stat().st_mtime_ns <= renamed
