"""The index of Keras' files: every weight as HDF5 has it; configurations that carry code, links and bombs refused."""

import io
import json
import random
import zipfile

import hostile_archives as hostile
import numpy as np
import pytest
import runtime_models as models
from weight_reading import bounded, read_tensors, survives

from tether.errors import BadModelError, HostileModelError
from tether.runtimes import inspect, tensorflow
from tether.runtimes.weights import CONVERTED, read_index
from tether.runtimes.weights.keras_config import check_config
from tether.testing.requirements import needs

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
DENSE = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 3, "activation": "relu"}, "registered_name": None}


def archive(config, **more):
    members = {"metadata.json": b"{}", "config.json": config if isinstance(config, bytes) else json.dumps(config).encode()} | more
    return hostile.zip_of([hostile.Entry(name, data) for name, data in members.items()])


def h5(fill, **options):
    import h5py

    file = io.BytesIO()
    with h5py.File(file, "w", **options) as opened:
        fill(opened)
    return file.getvalue()


def write(folder, data, name="m.keras"):
    path = folder / name
    path.write_bytes(data)
    return path


def with_weights(fill):
    return archive(DENSE, **{"model.weights.h5": h5(fill)})


@needs("keras")
def test_every_weight_of_a_keras_file_lies_in_place(tmp_path):
    import h5py
    import keras

    x = keras.Input((8, 8, 1), name="x")
    hidden = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(x))
    model = keras.Model(x, keras.layers.Dense(2, name="y")(keras.layers.Flatten()(hidden)))
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    found, data = read_tensors(tmp_path / "m.keras", "keras", tmp_path)
    with zipfile.ZipFile(tmp_path / "m.keras") as zipped, h5py.File(io.BytesIO(zipped.read("model.weights.h5"))) as file:
        assert {tensor.name: data(tensor) for tensor in found} == {tensor.name: file[tensor.name][()].tobytes() for tensor in found}
    assert {tensor.file for tensor in found} == {"m.keras"}
    assert len(found) == len(model.weights)
    assert {data(tensor) for tensor in found} == {weight.numpy().tobytes() for weight in model.weights}
    (tmp_path / "model.py").write_text("")
    names = {tensor.name for tensor in read_index(tmp_path, "custom")}
    assert {"m/layers/dense/vars/0", "m.weights/layers/dense/vars/0"} <= names


@needs("keras")
def test_the_echo_and_bfloat16_are_read(tmp_path):
    import keras

    assert read_index(models.keras_echo(tmp_path, ["FP32"]), "keras") == []
    x = keras.Input((4,), name="x")
    layer = keras.layers.Dense(3, dtype=keras.dtype_policies.DTypePolicy("bfloat16"))
    keras.Model(x, layer(x)).save(tmp_path / "half.keras")
    found, data = read_tensors(tmp_path / "half.keras", "keras", tmp_path)
    assert {(tensor.dtype, tensor.shape) for tensor in found} == {("bfloat16", (4, 3)), ("bfloat16", (3,))}
    assert data(found[0]) == np.asarray(layer.kernel).tobytes()


@needs("h5py")
def test_what_hdf5_packs_or_turns_is_written_out(tmp_path):
    values = {
        "plain": np.arange(12, dtype="<f4").reshape(3, 4),
        "big": np.arange(10).astype(">f8"),
        "flags": np.array([True, False]),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3)),
        "complex": np.ones(2, np.complex64),
    }
    packed = np.random.default_rng(1).integers(0, 9, (300, 70))

    def fill(file):
        for name, value in values.items():
            file[f"layer/{name}"] = value
        file.create_dataset("packed", data=packed, chunks=(7, 70), compression="gzip", shuffle=True, fletcher32=True)
        file["text"] = "left out"
        file["record"] = np.zeros(2, [("a", "f4")])

    (tmp_path / "model.py").write_text("")
    write(tmp_path, h5(fill), "m.h5")
    found, data = read_tensors(tmp_path, "custom", tmp_path.parent)
    wanted = {f"layer/{name}": value.astype(value.dtype.newbyteorder("<")).tobytes() for name, value in values.items()}
    assert {tensor.name: data(tensor) for tensor in found} == wanted | {"packed": packed.tobytes()}
    assert {tensor.name for tensor in found if tensor.file == CONVERTED and tensor.nbytes} == {"layer/big", "packed"}


def external(file):
    import h5py

    file["there"] = h5py.ExternalLink("/etc/passwd.h5", "/data")


def soft(file):
    import h5py

    file["here"] = h5py.SoftLink("/other")


def elsewhere(file):
    file.create_dataset("w", (10,), "u1", external=[("/etc/passwd", 0, 10)])


def virtual(file):
    import h5py

    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "w", (4,))
    file.create_virtual_dataset("w", layout)


def filtered(file):
    import h5py

    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((4,))
    plan.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    h5py.h5d.create(file.id, b"w", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4,)), plan)


def bomb(file):
    file.create_dataset("w", (1 << 30,), "f4", chunks=(1 << 20,), compression="gzip")


def chunk_bomb(file):
    file.create_dataset("w", (4,), "f4", chunks=(1 << 28,), maxshape=(None,), compression="gzip")


def endless(file):
    file.create_dataset("w", (1 << 40, 1 << 20), "f4", chunks=(1, 1024))


def unallocated(file):
    file.create_dataset("w", (1 << 45,), "f4", fillvalue=1.0)


def deep(file):
    group = file
    for _ in range(200):
        group = group.create_group("g")


HDF5 = {each.__name__: each for each in (external, soft, elsewhere, virtual, filtered, bomb, chunk_bomb, endless, unallocated, deep)}


@needs("h5py")
@pytest.mark.parametrize("kind", HDF5)
@pytest.mark.parametrize("alone", [True, False], ids=["h5", "keras"])
def test_hdf5_that_leads_elsewhere_or_unpacks_to_too_much_is_refused(tmp_path, kind, alone):
    if alone:
        (tmp_path / "model.py").write_text("")
        write(tmp_path, h5(HDF5[kind]), "m.h5")
    path, model_format = (tmp_path, "custom") if alone else (write(tmp_path, with_weights(HDF5[kind])), "keras")
    with bounded(), pytest.raises(HostileModelError):
        read_index(path, model_format)


@needs("h5py")
def test_groups_that_contain_themselves_are_walked_once(tmp_path):
    def fill(file):
        group = file.create_group("g")
        group["again"] = group
        group["root"] = file["/"]
        group["w"] = np.ones(3, "f4")
        group["tied"] = group["w"]

    assert [tensor.name for tensor in read_index(write(tmp_path, with_weights(fill)), "keras")] == ["g/tied"]


@needs("h5py")
def test_what_was_cut_off_or_mutated_is_refused_or_within_the_file(tmp_path):
    def fill(file):
        file["layers/dense/vars/0"] = np.arange(40.0)
        file.create_dataset("layers/dense/vars/1", data=np.arange(4000), chunks=(100,), compression="gzip")

    good = with_weights(fill)
    for percent in range(0, 100, 2):
        with pytest.raises(BadModelError):
            read_index(write(tmp_path, good[: len(good) * percent // 100]), "keras")
    chance = random.Random("mutated keras files")
    start = good.index(b"\x89HDF")
    for _ in range(100):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(start, len(data))] = chance.choice((0, 1, 0xFF, chance.randrange(256)))
        survives(write(tmp_path, bytes(data)), "keras", tmp_path)
    (tmp_path / "model.py").write_text("")
    bare = h5(fill)
    for percent in range(0, 100, 2):
        write(tmp_path, bare[: len(bare) * percent // 100], "m.h5")
        read_index(tmp_path, "custom")


def layer(kind="Dense", module="keras.layers", config=None, registered=None, **more):
    return {"module": module, "class_name": kind, "config": {} if config is None else config, "registered_name": registered} | more


HOSTILE_CONFIGS = {
    "lambda layer": layer("Lambda", config={"function": layer("__lambda__", "builtins", {"code": "4wEAAA=="})}),
    "lambda value": layer(config={"activation": {"class_name": "__lambda__", "config": {"value": "x"}}}),
    "lambda of the first Keras": {
        "class_name": "Sequential",
        "config": {"layers": [{"class_name": "Lambda", "config": {"function": ["4wEAAA=="]}}]},
    },
    "torch module": layer("TorchModuleWrapper", config={"module": "UEsDBA=="}),
    "saved model elsewhere": layer("TFSMLayer", config={"filepath": "/somewhere"}),
    "jax layer": layer("JaxLayer"),
    "switching checks off": layer("function", "keras.config", "enable_unsafe_deserialization"),
    "switching checks off as a call": layer(config={"f": layer("enable_unsafe_deserialization", "keras.saving")}),
    "fetching a file": layer("function", "keras.utils", "get_file"),
    "another part of keras": layer("load_model", "keras.saving"),
    "an inner part of keras": layer("get_file", "keras.src.utils.file_utils"),
    "module of python": layer("system", "os"),
    "module of python, as a function": layer("function", "os", "system"),
    "builtin": layer("eval", "builtins"),
    "a function of builtins by a path": layer("function", "builtins", "os.system"),
    "subprocess": layer("Popen", "subprocess", {"args": ["id"]}),
    "vocabulary from a file": layer("StringLookup", config={"vocabulary": "/etc/passwd"}),
    "a typespec": layer("__typespec__", None, {"spec_name": "io"}),
    "a configuration in a text": layer(config={"layer": json.dumps(layer("Lambda"))}),
}
FOREIGN_CONFIGS = {
    "a class of one's own": layer("Mine", "mine.layers", registered="Mine"),
    "a registered class": layer("Mine", None, registered="package>Mine"),
    "a builtin under another name": layer("Dense", registered="package>Dense"),
    "a class that is a number": layer(7),
    "a module that is a list": layer("Dense", ["os"]),
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("kind", HOSTILE_CONFIGS)
@pytest.mark.parametrize("nested", [False, True], ids=["itself", "deep"])
def test_configurations_that_carry_code_are_refused(tmp_path, kind, nested):
    config = HOSTILE_CONFIGS[kind]
    for _ in range(30 * nested):
        config = {"module": "keras", "class_name": "Functional", "config": {"layers": [DENSE, config]}, "registered_name": "Functional"}
    path = write(tmp_path, archive(config))
    for act in (lambda: read_index(path, "keras"), lambda: inspect(path), lambda: tensorflow.TensorFlowRuntime().inspect(path)):
        with pytest.raises(HostileModelError, match=r"m\.keras"):
            act()


@pytest.mark.parametrize("kind", FOREIGN_CONFIGS)
def test_configurations_with_classes_of_others_say_what_to_do(tmp_path, kind):
    with bounded(), pytest.raises(BadModelError, match=r"model\.py|save the model again"):
        read_index(write(tmp_path, archive(FOREIGN_CONFIGS[kind])), "keras")


@needs("h5py")
@pytest.mark.parametrize("kind", ["lambda of the first Keras", "torch module"])
def test_an_h5_with_code_in_its_configuration_is_refused(tmp_path, kind):
    def fill(file):
        file.attrs["model_config"] = json.dumps(HOSTILE_CONFIGS[kind])
        file["w"] = np.ones(3)

    (tmp_path / "model.py").write_text("")
    write(tmp_path, h5(fill), "m.h5")
    with pytest.raises(HostileModelError, match="carries code"):
        read_index(tmp_path, "custom")


ARCHIVES = {
    "a pickle as the configuration": archive(hostile.PLANT),
    "a pickle as the metadata": archive(DENSE, **{"metadata.json": hostile.PLANT}),
    "a pickle as an asset": archive(DENSE, **{"assets/a.txt": hostile.PLANT}),
    "a pickle as the weights": archive(DENSE, **{"model.weights.h5": hostile.PLANT}),
    "weights of another form": archive(DENSE, **{"model.weights.npz": b"PK"}),
    "no configuration": hostile.torch_zip({"a": b""}),
    "an asset outside": archive(DENSE, **{"../a": b""}),
    "packed weights": hostile.zip_of([hostile.Entry("config.json", b"{}"), hostile.Entry("model.weights.h5", bytes(99), 8)]),
    "no archive": b"PK\x03\x04",
    "text": b"<html>",
}


@needs("h5py")
@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_that_are_none_of_keras_are_refused(tmp_path, kind):
    with bounded(), pytest.raises(BadModelError):
        read_index(write(tmp_path, ARCHIVES[kind]), "keras")


@needs("keras")
def test_what_keras_itself_writes_is_not_refused(tmp_path):
    import keras

    x = keras.Input((6, 4), name="x")
    hidden = keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True))(x)
    hidden = keras.layers.Conv1D(2, 2, activation=keras.activations.gelu, kernel_regularizer=keras.regularizers.L2(0.1))(hidden)
    hidden = keras.ops.mean(keras.ops.relu(hidden) * 2.0, axis=1)
    model = keras.Model(
        x, keras.layers.Dense(2, kernel_initializer=keras.initializers.HeNormal(seed=1), kernel_constraint="max_norm")(hidden)
    )
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    model.compile(keras.optimizers.Adam(schedule), loss=keras.losses.Huber(), metrics=["mse", keras.metrics.MeanAbsoluteError()])
    model.save(tmp_path / "m.keras")
    assert read_index(tmp_path / "m.keras", "keras")
    assert inspect(tmp_path / "m.keras").inputs
    for make in (models.keras_rows, lambda folder: models.keras_echo(folder, ["FP32", "INT64"])):
        with zipfile.ZipFile(make(tmp_path)) as zipped:
            check_config(zipped.read("config.json"), "m")
