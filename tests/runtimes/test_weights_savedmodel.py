"""The index of SavedModels: every variable as TensorFlow restores it, in place; graphs that reach files, Python or the network refused."""

import random
import struct

import hostile_archives as hostile
import pytest
import runtime_models as models
from hostile_archives import const_text, function, msg, node, saved_model
from weight_reading import bounded, read_tensors

from tether.errors import BadModelError, HostileModelError
from tether.runtimes import inspect, tensorflow
from tether.runtimes.weights import boundaries, read_index, savedmodel
from tether.runtimes.weights.limits import tensor_nbytes
from tether.testing.requirements import needs

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
KEY = "a/w/.ATTRIBUTES/VARIABLE_VALUE"
FLOATS = struct.pack("<6f", *range(6))
PLAIN = saved_model([node("out", "Placeholder")])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """SavedModels of each kind, by name."""
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("saved")
    models.savedmodel_rows(folder / "variables", 100_000)
    models.savedmodel_echo(folder / "strings", ["FP32", "BYTES"])
    (folder / "words.txt").write_text("a\nb\n")

    class Words(tf.Module):
        def __init__(self):
            super().__init__()
            reader = tf.lookup.TextFileInitializer(
                str(folder / "words.txt"), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
            )
            self.table = tf.lookup.StaticVocabularyTable(reader, 1)
            self.twins = [tf.Variable(1.0, name="twin"), tf.Variable(2.0, name="twin")]
            self.kinds = [tf.Variable(tf.cast([1, 2, 3], kind), name=f"kind_{kind.name}") for kind in KINDS(tf)]

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def serve(self, x):
            return {"y": self.table.lookup(x), "c": tf.constant([float(number) for number in range(500)])}

    words = Words()
    tf.saved_model.save(words, str(folder / "words"), signatures={"serving_default": words.serve})
    return folder


def KINDS(tf):  # noqa: N802 (a constant, but for the import)
    return [tf.float64, tf.float16, tf.bfloat16, tf.int8, tf.int64, tf.uint8, tf.bool, tf.complex64]


@needs("tensorflow")
@pytest.mark.parametrize("name", ["variables", "strings", "words"])
def test_every_variable_is_as_tensorflow_restores_it(saved, tmp_path, name):
    from tensorflow.python.training import py_checkpoint_reader

    found, data = read_tensors(saved / name, "savedmodel", tmp_path)
    if name == "strings":
        assert found == []
        return
    reader = py_checkpoint_reader.NewCheckpointReader(str(saved / name / "variables/variables"))
    keys = [key for key in reader.get_variable_to_shape_map() if not key.startswith("_CHECKPOINTABLE")]
    variables = [tensor for tensor in found if tensor.file != "saved_model.pb"]
    wanted = sorted((reader.get_tensor(key).tobytes(), reader.get_tensor(key).dtype.name, reader.get_tensor(key).shape) for key in keys)
    assert sorted((data(tensor), tensor.dtype, tensor.shape) for tensor in variables) == wanted
    assert all(tensor.file.startswith("variables/variables.data-") for tensor in variables)


@needs("tensorflow")
def test_variables_have_their_names_and_those_that_share_one_their_keys(saved):
    names = {tensor.name for tensor in read_index(saved / "words", "savedmodel")}
    assert {"kind_bfloat16", "kind_bool", "twins/0", "twins/1"} <= names


@needs("tensorflow")
def test_large_constants_are_found_in_the_graph(saved, tmp_path):
    found, data = read_tensors(saved / "words", "savedmodel", tmp_path)
    [constant] = [tensor for tensor in found if tensor.file == "saved_model.pb"]
    assert data(constant) == struct.pack("<500f", *range(500))


@needs("tensorflow")
def test_keras_exports_are_read_under_the_names_of_their_layers(tmp_path):
    import keras

    x = keras.Input((4,), name="x")
    model = keras.Model(x, keras.layers.Dense(3, name="y")(keras.layers.BatchNormalization(name="norm")(x)))
    model.export(tmp_path / "saved", verbose=False)
    found, data = read_tensors(tmp_path / "saved", "savedmodel", tmp_path)
    by_name = {tensor.name: data(tensor) for tensor in found}
    assert by_name["y/kernel"] == model.get_layer("y").kernel.numpy().tobytes()
    assert {"norm/gamma", "norm/moving_mean", "y/bias"} <= set(by_name)
    assert inspect(tmp_path / "saved").outputs


@needs("tensorflow")
def test_a_model_that_reads_files_is_refused_before_tensorflow_loads_it(tmp_path):
    import tensorflow as tf

    models.saved_model(tmp_path, lambda x: {"y": tf.io.read_file(x)}, [tf.TensorSpec((), tf.string, name="x")])
    with pytest.raises(HostileModelError, match=r"ReadFile"):
        inspect(tmp_path)


@needs("tensorflow")
def test_what_was_cut_off_or_mutated_is_refused_or_within_the_files(saved, tmp_path):
    chance = random.Random("mutated saved models")
    for name in ("saved_model.pb", "variables/variables.index"):
        good = (saved / "words" / name).read_bytes()
        cut = [good[: len(good) * percent // 100] for percent in range(0, 100, 2)]
        folder = tmp_path / name.replace("/", "-")
        hostile.write_saved_model(folder, (saved / "words/saved_model.pb").read_bytes())
        for file in (saved / "words/variables").iterdir():
            (folder / "variables" / file.name).write_bytes(file.read_bytes())
        for data in cut + [mutated(good, chance) for _ in range(60)]:
            (folder / name).write_bytes(data)
            survives(folder)


def mutated(good, chance):
    data = bytearray(good)
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return bytes(data)


def survives(folder):
    try:
        found = read_index(folder, "savedmodel")
    except BadModelError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert boundaries(folder, "savedmodel") == {}
        return
    for tensor in found:
        assert tensor.nbytes == tensor_nbytes(tensor.name, tensor.dtype, tensor.shape)
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= (folder / tensor.file).stat().st_size


# --- without TensorFlow


def write(folder, model=PLAIN, entries=None, **more):
    return hostile.write_saved_model(folder / "model", model, entries, **more)


def entry(**changes):
    values = {"dtype": 1, "shape": (2, 3), "offset": 0, "nbytes": 24} | changes
    return {KEY.encode(): hostile.bundle_entry(**values)}


def test_an_index_that_was_put_together_by_hand_is_read(tmp_path):
    found, data = read_tensors(write(tmp_path, entries=entry(), data=FLOATS), "savedmodel", tmp_path)
    assert [(tensor.name, tensor.dtype, tensor.shape, data(tensor)) for tensor in found] == [("a/w", "float32", (2, 3), FLOATS)]


BAD_ENTRIES = {
    "offset behind the file": entry(offset=1),
    "negative offset": entry(offset=-1),
    "length of 2^63": entry(nbytes=1 << 63),
    "another length": entry(nbytes=20),
    "dimensions that overflow": entry(shape=(1 << 62, 8), nbytes=0),
    "negative dimension": entry(shape=(-2, -3)),
    "33 axes": entry(shape=(1,) * 33),
    "a file that is not there": entry(shard=1),
    "a negative file": entry(shard=-1),
    "garbage": {KEY.encode(): b"\x08\x01\x12\xff\xff\xff\xff\x0f"},
    "overlap": entry(shape=(3,), nbytes=12) | {b"other": hostile.bundle_entry(1, (3,), 4, 12)},
    "a name twice": entry() | {b"a/w": hostile.bundle_entry(1, (2, 3), 0, 24)},
}


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_variables_that_lie_elsewhere_are_refused(tmp_path, kind):
    folder = write(tmp_path, entries=BAD_ENTRIES[kind], data=FLOATS)
    with bounded(), pytest.raises(BadModelError):
        read_index(folder, "savedmodel")


BAD_TABLES = {
    "compressed": hostile.table(entry(), compression=1),
    "keys that share what is not there": hostile.table(entry(), shared=5),
    "no magic": hostile.table(entry())[:-1] + b"x",
    "handles behind the end": bytes(40).replace(b"\0", b"\x7f") + hostile.table({})[-8:],
    "empty": b"",
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_an_index_that_is_none_is_refused(tmp_path, kind):
    folder = write(tmp_path, entries={}, data=FLOATS)
    (folder / "variables/variables.index").write_bytes(BAD_TABLES[kind])
    with bounded(), pytest.raises(BadModelError):
        read_index(folder, "savedmodel")


def test_a_million_data_files_and_big_endian_ones_are_refused(tmp_path):
    folder = write(tmp_path, entries={})
    for header in (msg((1, 1_000_000)), msg((1, 1), (2, 1))):
        (folder / "variables/variables.index").write_bytes(hostile.table({b"": header}))
        with pytest.raises(BadModelError):
            read_index(folder, "savedmodel")


@pytest.mark.parametrize("name", ["variables", "variables/variables.index", "variables/variables.data-00000-of-00001", "saved_model.pb"])
def test_links_are_not_followed(tmp_path, name):
    folder = write(tmp_path, entries=entry(), data=FLOATS)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostileModelError, match="link"):
        read_index(folder, "savedmodel")


PATH = const_text("path", "/etc/passwd")
SAVE = node("save", "SaveV2", ["path:output:0"])
TABLE = node("table", "InitializeTableFromTextFileV2", ["handle", "path:output:0"])
CALL = node("out", "PartitionedCall", ["x"], [("f", msg((10, msg((1, "f")))))])
OUT = node("out", "Identity", ["inner"])
OPERATIONS = ("ReadFile", "WriteFile", "MatchingFiles", "PyFunc", "EagerPyFunc", "PyFuncStateless", "ImmutableConst", "LoadDataset")
REFUSED = {
    **{f"{op} in the graph": saved_model([node("out", op)]) for op in OPERATIONS},
    **{f"{op} in a function": saved_model([CALL], [function("f", [node("inner", op)])]) for op in OPERATIONS},
    **{f"{op} in a function that nothing calls": saved_model([], [function("f", [node("inner", op)])]) for op in OPERATIONS},
    "ExperimentalCSVDataset": saved_model([node("out", "ExperimentalCSVDataset")]),
    "a hidden graph": saved_model([node("out", "DatasetFromGraph")]),
    "a print to a file": saved_model([node("out", "PrintV2", (), [("output_stream", msg((2, "file:///etc/motd")))])]),
    "a save behind the signature": saved_model([OUT, node("inner", "NoOp", ["^save"]), PATH, SAVE]),
    "a save in a function behind the signature": saved_model([CALL], [function("f", [SAVE])]),
    "a save in a function behind a function": saved_model(
        [CALL], [function("f", [node("g", "PartitionedCall", (), [("f", msg((10, msg((1, "saver")))))])]), function("saver", [SAVE])]
    ),
    "a save in a branch": saved_model(
        [node("out", "Case", ["x"], [("branches", msg((1, msg((9, msg((1, "saver")))))))])], [function("saver", [SAVE])]
    ),
    "a save in a function called by its name": saved_model([node("out", "saver")], [function("saver", [SAVE])]),
    "a save under a path of its own": saved_model([node("out", "NoOp")], [function("__inference__traced_save_1", [PATH, SAVE])]),
    "a restore behind the signature": saved_model([OUT, node("inner", "RestoreV2", ["path"]), PATH]),
    "a table of a file of its own": saved_model([node("out", "NoOp")], [function("init", [PATH, TABLE])]),
    "a table before the file of its own": saved_model([node("out", "NoOp")], [function("init", [TABLE, PATH])]),
    "a table of a file of its own in the graph": saved_model([OUT, PATH, node("inner", "InitializeTableFromTextFile", ["handle", "path"])]),
    "an asset outside": saved_model([OUT], assets=[("path", "../../etc/passwd")]),
    "an absolute asset": saved_model([OUT], assets=[("path", "/etc/passwd")]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_graphs_that_reach_out_are_refused(tmp_path, kind):
    folder = write(tmp_path, REFUSED[kind])
    with bounded(), pytest.raises(HostileModelError, match="SavedModel"):
        savedmodel.check(folder)
    with pytest.raises(HostileModelError):
        read_index(folder, "savedmodel")
    with pytest.raises(HostileModelError):
        tensorflow.TensorFlowRuntime().inspect(folder)


ALLOWED = {
    "a saver's functions": saved_model(
        [node("out", "NoOp"), node("call", "PartitionedCall", (), [("f", msg((10, msg((1, "save")))))])],
        [function("save", [SAVE])],
        saver=msg((2, "call")),
    ),
    "a saver in the graph": saved_model([node("out", "NoOp"), node("prefix", "Const"), node("save", "SaveV2", ["prefix"])]),
    "a table of an asset": saved_model(
        [OUT, node("path", "Placeholder"), node("inner", "InitializeTableFromTextFileV2", ["handle", "path"])],
        assets=[("path", "words.txt")],
    ),
    "a table of what is passed in": saved_model(
        [OUT], [function("init", [node("t", "InitializeTableFromTextFileV2", ["handle", "path"])])]
    ),
    "a print": saved_model([node("out", "PrintV2", (), [("output_stream", msg((2, "stderr")))])]),
}


@pytest.mark.parametrize("kind", ALLOWED)
def test_graphs_that_tensorflow_writes_are_not_refused(tmp_path, kind):
    savedmodel.check(write(tmp_path, ALLOWED[kind]))


def test_constants_whose_size_is_a_lie_are_refused(tmp_path):
    value = msg((8, msg((1, 1), (2, msg((2, msg((1, 1 << 40))))), (4, bytes(2000)))))
    folder = write(tmp_path, saved_model([node("out", "Const", (), [("value", value)])]))
    with pytest.raises(BadModelError, match="constant"):
        read_index(folder, "savedmodel")


def test_random_bytes_are_a_bad_model(tmp_path):
    chance = random.Random("random saved models")
    folder = write(tmp_path)
    for size in (0, 1, 10, 1000, 100_000):
        (folder / "saved_model.pb").write_bytes(chance.randbytes(size))
        survives(folder)
