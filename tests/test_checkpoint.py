"""Checkpoints: what is read is what was saved, on any mesh, after any damage, or it is said what is wrong."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfa_jax.train import integrity, processes
from mfa_jax.train.checkpoint import Checkpoints, CheckpointWriteError, DamagedCheckpointError, Restored
from mfa_jax.train.integrity import UnreadableCheckpointError, checksum, unreadable

# When one array cannot be read, orbax closes its event loop under the reads beside it. Those complain when they finish
# ("Event loop is closed", from a thread of tensorstore: "in: None") or when they are collected ("<coroutine ...>"); the
# fixture below collects them within the test that caused them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. (None|<coroutine object _read_array_index):pytest.PytestUnraisableExceptionWarning")

META = {"config": {"steps": 5}, "data": {"next_index": 7}, "metrics": {"loss": 1.5}}


@pytest.fixture(autouse=True)
def collect_abandoned_reads() -> Iterator[None]:
    yield
    gc.collect()


def mesh_of(count: int) -> jax.sharding.Mesh:
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices, there are {jax.device_count()}")
    return jax.make_mesh((count,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def sharded(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    def spec(leaf: Any) -> PartitionSpec:
        return PartitionSpec("fsdp") if leaf.ndim and leaf.shape[0] % mesh.size == 0 else PartitionSpec()

    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), tree)


def state(seed: int = 0, count: int = 1) -> dict[str, Any]:
    """A small training state: float32 and bfloat16 parameters, optax state with empty nodes, an EMA, a typed key."""
    rng = np.random.default_rng(seed)
    params = {"layers": {"S_q": jnp.asarray(rng.normal(size=(8, 16, 4)), jnp.float32)},
              "embed": jnp.asarray(rng.normal(size=(64, 16)), jnp.bfloat16)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    items = {"params": params, "optimizer": optimizer, "rng": {"key": jax.random.key(seed)}}
    return jax.device_put(items, sharded(items, mesh_of(count)))


def abstract(items: Any, count: int = 1) -> Any:
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), items,
                        sharded(items, mesh_of(count)))


def plain(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x), tree)


def assert_same(found: Any, wanted: Any) -> None:
    chex.assert_trees_all_equal(plain(found), plain(wanted), strict=True)


def restored(store: Checkpoints, *args: Any, **kwargs: Any) -> Restored:
    found = store.restore(*args, **kwargs)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 1, 2 and 3, of seeds 1, 2 and 3; copied, never changed."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    with Checkpoints(folder) as store:
        for step in (1, 2, 3):
            store.save(step, state(step), {**META, "step": step})
    return folder


@pytest.fixture
def copy(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


@pytest.mark.parametrize("count", [8, 2, 1])
def test_restores_exactly_on_another_mesh(tmp_path: Path, count: int) -> None:
    items = state(count=8)
    with Checkpoints(tmp_path) as store:
        store.save(5, items, META, wait=True)
    with Checkpoints(tmp_path, read_only=True) as store:
        wanted = abstract(items, count)
        found = restored(store, wanted)
    assert found.step == 5 and found.meta == META and found.skipped == {}
    assert_same(found.items, items)
    for leaf, want in zip(jax.tree.leaves(found.items), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
    assert jax.random.key_impl(found.items["rng"]["key"]) == jax.random.key_impl(items["rng"]["key"])


def test_one_item_can_be_restored_alone(three: Path) -> None:
    with Checkpoints(three, read_only=True) as store:
        found = restored(store, abstract({"params": state()["params"]}))
        assert store.read_meta() == (3, {**META, "step": 3})
        assert store.read_meta(1) == (1, {**META, "step": 1})
    assert set(found.items) == {"params"}
    assert_same(found.items["params"], state(3)["params"])


def test_an_explicit_step(three: Path) -> None:
    with Checkpoints(three, read_only=True) as store:
        found = restored(store, abstract(state()), 2)
        assert found.step == 2
        assert_same(found.items, state(2))
        with pytest.raises(ValueError, match=r"step=4: is not in .*there are \[1, 2, 3\]"):
            store.restore(abstract(state()), 4)


def test_nothing_there(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "none", read_only=True) as store:
        assert store.steps() == [] and store.restore(abstract(state())) is None and store.read_meta() is None
    assert not (tmp_path / "none").exists()


def test_saved_arrays_may_be_donated_at_once(tmp_path: Path) -> None:
    big = jax.device_put(jnp.arange(2.0**20).reshape(1024, 1024), NamedSharding(mesh_of(1), PartitionSpec()))
    overwrite = jax.jit(lambda x: -x, donate_argnums=0)
    with Checkpoints(tmp_path) as store:
        store.save(1, {"params": {"w": big}}, {})
        wanted = abstract({"params": {"w": big}})
        for _ in range(3):
            big = overwrite(big)
        found = restored(store, wanted)
    np.testing.assert_array_equal(found.items["params"]["w"], np.arange(2.0**20).reshape(1024, 1024))


# ---- damage ----


def largest(folder: Path) -> Path:
    return max((path for path in folder.glob("params/**/d/*") if path.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


def flip_meta(folder: Path) -> None:
    path = folder / "meta" / "metadata"
    text = path.read_text()
    assert '"next_index": 7' in text
    path.write_text(text.replace('"next_index": 7', '"next_index": 6'))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "bit flip": lambda f: flip(largest(f)),
    "truncated": lambda f: os.truncate(largest(f), largest(f).stat().st_size // 2),
    "data file gone": lambda f: largest(f).unlink(),
    "item gone": lambda f: shutil.rmtree(f / "optimizer"),
    "manifest cut": lambda f: os.truncate(f / "params" / "manifest.ocdbt", 5),
    "tree metadata cut": lambda f: os.truncate(f / "params" / "_METADATA", 20),
    "half deleted": lambda f: (shutil.rmtree(f / "params"), shutil.rmtree(f / "meta")),
    "empty": empty,
    "meta changed": flip_meta,
    "meta cut": lambda f: os.truncate(f / "meta" / "metadata", 30),
    "meta not text": lambda f: (f / "meta" / "metadata").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_reported_and_skipped(copy: Path, damage: Callable[[Path], object],
                                                      caplog: pytest.LogCaptureFixture) -> None:
    damage(copy / "3")
    with caplog.at_level(logging.WARNING, "mfa_jax"), Checkpoints(copy, read_only=True) as store:
        found = restored(store, abstract(state()))
        assert store.steps() == [1, 2, 3]
    assert found.step == 2 and found.meta["step"] == 2 and list(found.skipped) == [3]
    assert_same(found.items, state(2))
    assert "step 3 is skipped" in caplog.text and found.skipped[3] in caplog.text
    assert not copy.with_name("checkpoints-damaged").exists()


def test_a_writer_moves_damaged_checkpoints_aside_and_saves_their_steps_again(copy: Path) -> None:
    flip(largest(copy / "3"))
    before = largest(copy / "3").read_bytes()
    (copy / "4.orbax-checkpoint-tmp").mkdir()
    (copy / "4.orbax-checkpoint-tmp" / "part").write_text("half")
    with Checkpoints(copy) as store:
        found = restored(store, abstract(state()))
        assert found.step == 2 and sorted(found.skipped) == [3, 4]
        assert "checksum differs in params/" in found.skipped[3] and "did not finish" in found.skipped[4]
        assert store.steps() == [1, 2]
        for step in (3, 4):
            store.save(step, state(step), META)
        flip(largest(copy / "3"))  # a second time, while the manager is open
        store.wait()
        flip(largest(copy / "4"))
        assert sorted(restored(store, abstract(state())).skipped) == [3, 4]
    aside = copy.with_name("checkpoints-damaged")
    assert sorted(p.name for p in aside.iterdir()) == ["3", "3.1", "4", "unfinished"]
    assert largest(aside / "3").read_bytes() == before
    assert (aside / "unfinished" / "part").read_text() == "half"


def test_a_first_save_that_was_cut_off_is_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "c" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    with Checkpoints(tmp_path / "c") as store, caplog.at_level(logging.WARNING, "mfa_jax"):
        assert store.restore(abstract(state())) is None
    assert "did not finish" in caplog.text and (tmp_path / "c-damaged" / "unfinished").is_dir()


def test_all_damaged_is_an_error_with_every_reason(copy: Path) -> None:
    flip(largest(copy / "3"))
    shutil.rmtree(copy / "2" / "meta")
    empty(copy / "1")
    with Checkpoints(copy) as store:
        with pytest.raises(DamagedCheckpointError, match=r"(?s)step 3: checksum.*step 2: meta data.*step 1: meta data"):
            store.restore(abstract(state()))
        with pytest.raises(DamagedCheckpointError, match="step 3: checksum"):
            store.restore(abstract(state()), 3)
        assert store.steps() == [1, 2, 3], "with nothing to fall back on, nothing is moved"
    assert not copy.with_name("checkpoints-damaged").exists()


STALE = OSError(errno.ESTALE, "Stale file handle")


def no_longer_opened() -> ValueError:
    return ValueError("ABORTED: Error reading local file \"/c/3/params/d/1\": Error opening file "
                      "[os_error_code='116'] [tensorstore_spec='...']")  # as tensorstore says it


@pytest.mark.parametrize("failing", ["meta data", "metadata of orbax", "array"])
def test_what_the_disk_refuses_for_now_is_no_damage(
    copy: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale handle, as of a server that was restarted, where each kind of file is read."""
    read = type(epath.Path(copy)).read_text

    def refused(self: epath.Path, *given: Any, **more: Any) -> str:
        if self.parent.name == "meta" and self.parts[-3] == "3":
            raise STALE
        return read(self, *given, **more)

    def failed(error: Exception) -> Callable[..., Any]:
        def restore(*given: Any, **more: Any) -> Any:
            raise Exception("cannot read an array") from error  # as orbax does
        return restore

    with Checkpoints(copy) as store:
        if failing == "meta data":
            monkeypatch.setattr(type(epath.Path(copy)), "read_text", refused)
        else:
            monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore",
                                failed(STALE if failing == "metadata of orbax" else no_longer_opened()))
        with pytest.raises(UnreadableCheckpointError, match="Stale file .*errno 116.*nothing was moved") as caught:
            store.restore(abstract(state()))
        assert caught.value.errno == errno.ESTALE and "/3" in caught.value.filename
        monkeypatch.undo()
        assert store.steps() == [1, 2, 3] and restored(store, abstract(state())).step == 3
    assert not copy.with_name("checkpoints-damaged").exists()


def test_which_errors_are_damage() -> None:
    for code in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        assert unreadable(OSError(code, "gone"), "there") is None
    assert unreadable(ValueError("checksum differs"), "there") is None
    for code in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EMFILE):
        found = unreadable(OSError(code, "for now"), "there")
        assert found is not None and found.errno == code and found.filename == "there"
    found = unreadable(no_longer_opened(), "there")
    assert found is not None and found.filename == "/c/3/params/d/1"


KILLED = """
    import os, signal, sys, threading, time
    import jax, jax.numpy as jnp
    from mfa_jax.train.checkpoint import Checkpoints
    store = Checkpoints(sys.argv[1])
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.device_put({f"w{i}": jnp.full((512, 1024), 1.0) for i in range(8)}, one)
    store.save(1, {"params": tree}, {}, wait=True)
    threading.Timer(float(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    for step in range(2, 1000):
        store.save(step, {"params": jax.tree.map(lambda x: x * step, tree)}, {}, wait=True)
"""


@pytest.mark.parametrize("delay", [0.15, 0.27])
def test_kill_while_saving_leaves_the_last_good_one(tmp_path: Path, delay: float) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "c"), str(delay)],
                          env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == -9, done.stderr
    tree = {f"w{i}": jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=NamedSharding(mesh_of(1), PartitionSpec()))
            for i in range(8)}
    with Checkpoints(tmp_path / "c") as store:
        found = restored(store, {"params": tree})
        for leaf in found.items["params"].values():
            np.testing.assert_array_equal(leaf, np.full((512, 1024), float(found.step)))
        store.save(found.step + 1, found.items, {}, wait=True)
        assert store.steps()[-1] == found.step + 1


# ---- one writer ----


def test_a_second_writer_is_refused_until_the_first_has_closed(copy: Path) -> None:
    with Checkpoints(copy) as first:
        with pytest.raises(ValueError, match=rf"folder='{copy}': process {os.getpid()} on \S+ writes there; accepted"):
            Checkpoints(copy)
        with Checkpoints(copy, read_only=True) as reader:
            assert reader.steps() == [1, 2, 3]
        first.save(4, state(4), META, wait=True)
    assert (copy / processes.LOCK).read_bytes() == b"", "who held it is nobody's business any more"
    with Checkpoints(copy) as second:
        assert second.steps() == [2, 3, 4]


def test_a_writer_that_could_not_be_opened_leaves_no_lock(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(processes, "require_same", mock.Mock(side_effect=ValueError("steps differ")))
        with pytest.raises(ValueError, match="steps differ"):
            Checkpoints(copy)
    Checkpoints(copy).close()


WRITER = """
    import sys, time
    from mfa_jax.train.checkpoint import Checkpoints
    with Checkpoints(sys.argv[1]):
        print("open", flush=True)
        time.sleep(600)
"""


def test_a_writer_that_was_killed_locks_nothing(copy: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITER), str(copy)], stdout=subprocess.PIPE,
                          env={**os.environ, "JAX_PLATFORMS": "cpu"}, cwd=Path(__file__).parents[1]) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"open\n"
            with pytest.raises(ValueError, match=f"process {other.pid} on "):
                Checkpoints(copy)
        finally:
            other.kill()
        other.wait()
        Checkpoints(copy).close()


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_where_files_cannot_be_locked_it_is_said_and_steps_are_still_compared(
    copy: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes.fcntl, "flock", mock.Mock(side_effect=OSError(code, os.strerror(code))))
    with caplog.at_level(logging.WARNING, "mfa_jax"), Checkpoints(copy) as first, Checkpoints(copy) as second:
        second.save(4, state(4), META, wait=True)
        with pytest.raises(ValueError, match="step=4: must exceed the latest step 4"):
            first.save(4, state(5), META)
    assert f"cannot be locked ({os.strerror(code)}), so nothing keeps a second run" in caplog.text


def test_only_process_0_holds_the_lock(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with processes.sole_writer(epath.Path(copy)), monkeypatch.context() as patched:
        patched.setattr(processes.jax, "process_index", lambda: 1)
        patched.setattr(processes, "gather", lambda text: ["", text])
        with processes.sole_writer(epath.Path(copy)):
            pass
        patched.setattr(processes, "gather", lambda text: ["failed: folder='c': another process writes there", text])
        with pytest.raises(ValueError, match="process 0 failed: folder='c': another process writes there"), \
                processes.sole_writer(epath.Path(copy)):
            pass


# ---- another architecture ----


def with_leaf(tree: Any, **leaves: Any) -> Any:
    return {**tree, "params": {**tree["params"], **leaves}}


def test_another_architecture_is_an_error_not_damage(copy: Path) -> None:
    good = abstract(state())
    sharding = good["params"]["embed"].sharding

    def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    wrong = {
        r"params/embed is bfloat16\[64, 16\] in the checkpoint, expected bfloat16\[32, 16\]":
            with_leaf(good, embed=leaf((32, 16), jnp.bfloat16)),
        r"params/embed is bfloat16\[64, 16\] in the checkpoint, expected float32\[64, 16\]":
            with_leaf(good, embed=leaf((64, 16), jnp.float32)),
        r"params/unembed is missing in the checkpoint, expected float32\[64, 16\]":
            with_leaf(good, unembed=leaf((64, 16), jnp.float32)),
        r"params/layers/S_q is float32\[8, 16, 4\] in the checkpoint, expected no such leaf":
            {"params": {"embed": good["params"]["embed"]}},
        r"item='ema': is not in step 3 .*there are \['optimizer', 'params', 'rng'\]": {"ema": good["params"]},
    }
    with Checkpoints(copy) as store:
        for message, tree in wrong.items():
            with pytest.raises(ValueError, match=message) as caught:
                store.restore(tree)
            assert not isinstance(caught.value, DamagedCheckpointError)
        assert store.steps() == [1, 2, 3]


# ---- which ones stay ----


def test_keeps_the_latest_and_the_best(tmp_path: Path) -> None:
    items = {"rng": {"key": state()["rng"]["key"]}}
    metrics: list[float | None] = [3.0, 1.0, 2.0, None, float("nan"), 2.5, None]
    with Checkpoints(tmp_path, keep_last=2) as store:
        for step, metric in enumerate(metrics, 1):
            store.save(step, items, {}, metric=metric)
        store.wait()
        assert store.steps() == [2, 6, 7]
    with Checkpoints(tmp_path, keep_last=2) as store:  # the best is remembered by the folder, not by the process
        store.save(8, items, {}, metric=1.5, wait=True)
        assert store.steps() == [2, 7, 8]
        store.save(9, items, {}, metric=0.5)
        store.save(10, items, {}, wait=True)
        assert store.steps() == [9, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "9", "lock"]


def test_a_damaged_best_does_not_stop_a_new_run(copy: Path) -> None:
    (copy / "2" / "meta" / "metadata").write_text("{")
    with Checkpoints(copy, keep_last=2) as store:
        store.save(4, state(4), META, wait=True)
        assert store.steps() == [3, 4]


# ---- bad input ----


def test_bad_arguments(copy: Path) -> None:
    items = state()
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpoints(copy, keep_last=0)
    with Checkpoints(copy) as store:
        for step in (3, 1):
            with pytest.raises(ValueError, match=f"step={step}: must exceed the latest step 3"):
                store.save(step, items, {})
        with pytest.raises(ValueError, match="meta: must be JSON"):
            store.save(4, items, {"config": object()})
        with pytest.raises(ValueError, match=r"items\['params'\] w='text': must be a jax Array"):
            store.save(4, {"params": {"w": "text"}}, {})
        with pytest.raises(ValueError, match="items='meta': must be an identifier other than meta, metrics"):
            store.save(4, {"meta": items["params"]}, {})
        with pytest.raises(ValueError, match=r"items\['params'\]={}: must have at least one leaf"):
            store.save(4, {"params": {}}, {})
        with pytest.raises(ValueError, match="with a sharding"):
            store.restore({"rng": {"key": jax.eval_shape(jax.random.key, 0)}})
        assert store.steps() == [1, 2, 3]
    with Checkpoints(copy, read_only=True) as store, pytest.raises(ValueError, match="opened for reading only"):
        store.save(4, items, {})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointWriteError, match="cannot be written: Not a directory") as caught:
        Checkpoints(tmp_path / "file" / "checkpoints")
    assert caught.value.filename == str(tmp_path / "file" / "checkpoints")


# ---- disk full, read-only ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root on Linux)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def noise(size: int) -> Any:
    values = jnp.asarray(np.random.default_rng(0).normal(size=(size, 1024)), jnp.float32)
    return {"params": {"w": jax.device_put(values, NamedSharding(mesh_of(1), PartitionSpec()))}}


def test_a_full_disk_loses_nothing_and_is_told_at_the_next_call(small_disk: Path) -> None:
    with Checkpoints(small_disk / "c") as store:
        store.save(1, noise(100), META, wait=True)
        store.save(2, noise(1000), META)  # 4 MB on 2 MB; compressed it is still more
        with pytest.raises(CheckpointWriteError, match="step 2 was not written: No space left") as caught:
            store.save(3, noise(100), META)
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(small_disk / "c")
        assert store.steps() == [1]
        assert sorted(path.name for path in small_disk.rglob("*") if path.is_dir() and path.parent.name == "c") == ["1"]
        store.save(2, noise(100), META, wait=True)
        assert_same(restored(store, abstract(noise(100))).items, noise(100))
        assert store.steps() == [1, 2]
        store.save(3, noise(1000), META)
        with pytest.raises(CheckpointWriteError, match="step 3 was not written: No space left"):
            store.wait()
        assert store.steps() == [1, 2]
        store.save(4, noise(1000), META)
        with pytest.raises(CheckpointWriteError, match="step 4 was not written"):
            store.close()


def test_that_a_save_failed_is_known_before_the_next(small_disk: Path) -> None:
    with Checkpoints(small_disk / "c") as store:
        store.save(1, noise(100), META)
        while not store._files.is_over():
            assert not store.has_failed()
        assert not store.has_failed()
        store.save(2, noise(1000), META)
        while not store._files.is_over():
            pass
        assert store.has_failed() and store.has_failed(), "asking does not forget it"
        with pytest.raises(CheckpointWriteError, match="step 2 was not written: No space left"):
            store.wait()
        assert not store.has_failed()
        store.save(3, noise(100), META, wait=True)
        assert store.steps() == [1, 3]


def test_a_read_only_folder(small_disk: Path) -> None:
    with Checkpoints(small_disk / "c") as store:
        store.save(1, noise(100), META, wait=True)
        # Over it, since the lock is a file open for writing, and keeps the disk itself from being remounted.
        subprocess.run(["mount", "-o", "bind,ro", str(small_disk), str(small_disk)], check=True)
        with pytest.raises(CheckpointWriteError, match="step 2 was not written: Read-only file system") as caught:
            store.save(2, noise(100), META, wait=True)
        assert caught.value.errno == errno.EROFS
        assert store.steps() == [1]
    with pytest.raises(CheckpointWriteError, match="cannot be written: Read-only file system"):
        Checkpoints(small_disk / "c")
    with Checkpoints(small_disk / "c", read_only=True) as store:
        assert_same(restored(store, abstract(noise(100))).items, noise(100))
    subprocess.run(["umount", str(small_disk)], check=True)


# ---- the checksum ----


def test_checksum_by_hand_and_by_mesh() -> None:
    def mixed(word: int, position: int) -> int:
        h = word * (position * 2 * 1640531527 + 1) % 2**32
        h = (h ^ (h >> 15)) * 2246822519 % 2**32
        return h ^ (h >> 13)

    values = np.arange(48, dtype=np.float32).reshape(8, 6) - 7.5
    expected = sum(mixed(int(w), i) for i, w in enumerate(values.view(np.uint32).ravel())) % 2**32
    for count in (1, 2, 8):
        for spec in (PartitionSpec("fsdp"), PartitionSpec()):
            assert int(checksum(jax.device_put(values, NamedSharding(mesh_of(count), spec)))) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_checksums_on_one_cpu_take_the_memory_of_a_layer(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = jax.random.randint(jax.random.key(0), (6, 16, 64, 64), 0, 2**31 - 1).astype(dtype)
    programs = []
    compute = integrity._checksums

    def spy(leaves: dict[str, jax.Array], *, by_layer: bool) -> object:
        programs.append(compute.lower(leaves, by_layer=by_layer).compile())
        assert all(leaf.unsafe_buffer_pointer() == given[path].unsafe_buffer_pointer() for path, leaf in leaves.items())
        return compute(leaves, by_layer=by_layer)

    monkeypatch.setattr(integrity, "_checksums", spy)
    given = {"stacked": values, "single": values[0]}
    found = integrity.describe(given)
    assert {path: leaf[2] for path, leaf in found.items()} == {
        path: int(checksum(leaf)) for path, leaf in given.items()}
    assert programs[0].memory_analysis().temp_size_in_bytes < 3 * 4 * values[0].size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32", "float16"])
def test_checksum_sees_every_flipped_bit_and_every_swap(dtype: str) -> None:
    values = np.arange(6).astype(dtype)
    whole = int(checksum(jnp.asarray(values)))
    others = [values[[1, 0, 2, 3, 4, 5]], values[[0, 1, 2, 3, 5, 4]] if dtype != "bool" else ~values]
    for byte in range(values.nbytes if dtype != "bool" else 0):
        for bit in range(8):
            data = bytearray(values.tobytes())
            data[byte] ^= 1 << bit
            others.append(np.frombuffer(bytes(data), values.dtype))
    assert all(int(checksum(jnp.asarray(other))) != whole for other in others)


def test_meta_is_strict_json(three: Path) -> None:
    document = json.loads((three / "3" / "meta" / "metadata").read_text())
    assert document["meta"] == {**META, "step": 3} and document["step"] == 3
    assert document["leaves"]["params"]["layers/S_q"][:2] == ["float32", [8, 16, 4]]


def test_checksums_are_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dozens in flight, each with a sum over devices, can wait for each other for ever on the devices of a CPU."""
    calls = mock.Mock(wraps=integrity._checksums)
    monkeypatch.setattr(integrity, "_checksums", calls)
    found = integrity.describe(state(count=8))
    assert calls.call_count == 1 and len(found) == len(jax.tree.leaves(state()))


def test_a_checkpoint_beside_which_an_old_one_cannot_be_removed_is_saved(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Orbax removes them in the thread of the save, after it: of what fails there the save is not to blame."""
    with Checkpoints(tmp_path, keep_last=1) as store:
        for step in (1, 2, 3):
            store.save(step, state(step), META, wait=True)
            for other in range(1, step):  # as if these had stayed
                shutil.copytree(tmp_path / str(step), tmp_path / str(other), dirs_exist_ok=True)
        store._manager.reload()
        store.save(4, state(4), META)
        finished = store._manager.wait_until_finished

        def busy() -> None:
            finished()
            raise OSError(errno.EBUSY, "Device or resource busy")

        with monkeypatch.context() as patch:
            patch.setattr(store._manager, "wait_until_finished", busy)
            store.wait()
        assert "step 4 is saved, but older ones could not be removed" in caplog.text
        assert store.steps() == [4], "those that can be are"
        store._saving = 9  # and where nothing was saved it is an error, as before
        with monkeypatch.context() as patch, pytest.raises(CheckpointWriteError, match="step 9 was not written"):
            patch.setattr(store._manager, "wait_until_finished", busy)
            store.wait()


def test_a_reader_looks_again_where_a_writer_went_on(copy: Path) -> None:
    """With one checkpoint kept, what was to be read is gone when the next is there."""
    for old in (1, 2):
        shutil.rmtree(copy / str(old))
    with Checkpoints(copy, read_only=True) as reader:
        document = reader._document

        def goes_on(step: int) -> dict[str, Any]:
            if step == 3:
                (copy / "3").rename(copy / "4")
            return document(step)

        with mock.patch.object(reader, "_document", goes_on):
            assert reader.read_meta() == (4, {**META, "step": 3})


def test_of_saves_that_were_cut_off_the_last_is_kept_and_names_are_never_taken(copy: Path) -> None:
    aside = copy.with_name("checkpoints-damaged")
    (aside / "3.1").mkdir(parents=True)
    for content in ("first", "second"):
        (copy / "9.orbax-checkpoint-tmp").mkdir()
        (copy / "9.orbax-checkpoint-tmp" / "part").write_text(content)
        flip(largest(copy / "3")) if content == "second" else None
        with Checkpoints(copy) as store:
            assert restored(store, abstract(state())).skipped[9] == "its save did not finish"
    assert sorted(path.name for path in aside.iterdir()) == ["3", "3.1", "unfinished"]
    assert (aside / "unfinished" / "part").read_text() == "second"
