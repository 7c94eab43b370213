"""A SavedModel whose variables we read ourselves is the one that TensorFlow restores; what is unusual is left to TensorFlow."""

import shutil
import threading

import numpy as np
import pytest
import runtime_models as models

from tether.errors import BadModelError, HostileModelError
from tether.runtimes import load, load_arriving, savedmodel_restoring, tensorflow
from tether.runtimes.arrivals import Arrivals
from tether.runtimes.weights import savedmodel
from tether.testing.requirements import needs
from tether.types import ModelInfo, TensorSpec

pytestmark = [
    needs("tensorflow"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]
PROMPT = 60.0
DATA = "variables/variables.data-00000-of-00001"
KINDS = ["float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]
"""Those that the inference protocol has, so that a signature can answer them."""


@pytest.fixture
def ours(monkeypatch):
    """A load that TensorFlow's own restoring would fail."""

    def refused(path):
        raise AssertionError(f"{path.name} was left to TensorFlow")

    monkeypatch.setattr(tensorflow, "_load_saved", refused)


@pytest.fixture
def theirs(monkeypatch):
    """What was left to TensorFlow."""
    left, load_saved = [], tensorflow._load_saved
    monkeypatch.setattr(tensorflow, "_load_saved", lambda path: left.append(path) or load_saved(path))
    return left


def held(folder, values, options=None, **more):
    """Publishes variables as the answers of a model without inputs but one that it ignores."""
    import tensorflow as tf

    module = tf.Module()
    module.held = values

    def serve(x):
        flat = tf.nest.flatten(values)
        return {f"y{index}": tf.identity(value) for index, value in enumerate(flat)} | {"x": x}

    module.serve = tf.function(serve, input_signature=[tf.TensorSpec([None], tf.float32, name="x")], autograph=False)
    for name, value in more.items():
        setattr(module, name, value)
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve}, options=options)
    return folder


def info_of(folder):
    inputs, outputs, pure, _ = _untouched(folder)
    return ModelInfo("tensorflow", "savedmodel", inputs, outputs, batched=False, pure=pure, code=True)


_untouched = tensorflow._load_saved


def answers(folder, info, given, **arriving):
    model = load_arriving(folder, info, 1, **arriving) if arriving else load(folder, info)
    try:
        return model.run(given)
    finally:
        model.close()


def as_tensorflow_has_it(folder, given):
    return {name: value.numpy() for name, value in _untouched(folder)[3](given).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes(), name


X = {"x": np.zeros(1, np.float32)}


def numbers(kind, shape, seed):
    import tensorflow as tf

    bits = np.random.default_rng(seed).integers(0, 100, shape)
    return tf.cast(bits, kind)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (5, 7, 2), (600, 1024)], ids=str)
def test_variables_of_every_kind_and_shape_are_bit_for_bit_those_of_tensorflow(tmp_path, shape):
    import tensorflow as tf

    folder = held(tmp_path, [tf.Variable(numbers(kind, shape, seed)) for seed, kind in enumerate(KINDS)])
    assert_same(answers(folder, info_of(folder), X), as_tensorflow_has_it(folder, X))


@pytest.mark.usefixtures("ours")
def test_small_and_large_ones_between_each_other_are_told_apart(tmp_path):
    import tensorflow as tf

    chance = np.random.default_rng(7)
    sizes = chance.permutation([1, 3, 1000, 40_000, 262_144, 262_143, 300_000, 1_100_000, 5, 2_500_000])
    values = {f"v{index}": tf.Variable(chance.standard_normal(size).astype(np.float32)) for index, size in enumerate(sizes)}
    folder = held(tmp_path, {"deep": [values, (tf.Variable(1.0), {"a.b/c": tf.Variable(2)})]})
    assert_same(answers(folder, info_of(folder), X), as_tensorflow_has_it(folder, X))


@pytest.mark.usefixtures("ours")
def test_one_variable_under_two_names_stays_one(tmp_path):
    import tensorflow as tf

    shared = tf.Variable(tf.range(400_000.0))
    seen = tf.Variable(0.0)

    def serve(x):
        shared.assign_add(tf.ones_like(shared))
        return {"y": tf.stack([shared[-1], seen.assign_add(1.0)]) + x[:1]}

    module = tf.Module()
    module.one, module.other, module.seen = shared, [shared], seen
    module.serve = tf.function(serve, input_signature=[tf.TensorSpec([None], tf.float32, name="x")], autograph=False)
    tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.serve})
    info = info_of(tmp_path)
    for _ in range(2):  # what the first one wrote to its variables is not in the files
        model = load(tmp_path, info)
        assert [model.run(X)["y"].tolist() for _ in range(2)] == [[400_000.0, 1.0], [400_001.0, 2.0]]
        model.close()


@pytest.mark.usefixtures("ours")
def test_a_keras_export_answers_as_with_tensorflow(tmp_path):
    import keras

    x = keras.Input((16,), name="x")
    hidden = keras.layers.BatchNormalization()(keras.layers.Dense(600, activation="relu")(x))
    model = keras.Model(x, keras.layers.Dense(3, name="y")(keras.layers.Dropout(0.5)(keras.layers.Dense(600)(hidden))))
    model.export(tmp_path / "saved", verbose=False)
    given = {"x": np.random.default_rng(3).standard_normal((5, 16)).astype(np.float32)}
    wanted = as_tensorflow_has_it(tmp_path / "saved", given)
    assert_same(answers(tmp_path / "saved", info_of(tmp_path / "saved"), given), wanted)
    np.testing.assert_allclose(next(iter(wanted.values())), model(given["x"]), rtol=1e-4, atol=1e-6)


# --- what is unusual


def with_words(folder):
    import tensorflow as tf

    (folder / "words.txt").write_text("a\nb\n")
    reader = tf.lookup.TextFileInitializer(
        str(folder / "words.txt"), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
    )
    return tf.lookup.StaticVocabularyTable(reader, 1)


def with_numbers(_):
    import tensorflow as tf

    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([1, 2], [3, 4]), -1)


def with_text(_):
    import tensorflow as tf

    return tf.Variable("text")


def with_state(_):
    import tensorflow as tf

    return tf.random.Generator.from_seed(5)


def with_changing_table(_):
    import tensorflow as tf

    table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, -1)
    table.insert([1], [2])
    return table


def with_optimizer(_):
    import keras
    import tensorflow as tf

    weight = tf.Variable(1.0)
    optimizer = keras.optimizers.Adam()
    optimizer.apply_gradients([(tf.constant(1.0), weight)])
    return tf.train.Checkpoint(optimizer=optimizer, weight=weight)


@pytest.mark.parametrize("strange", [with_words, with_numbers, with_text, with_changing_table], ids=lambda make: make.__name__)
def test_what_is_more_than_plain_variables_is_left_to_tensorflow(tmp_path, theirs, strange):
    import tensorflow as tf

    folder = held(tmp_path / "saved", [tf.Variable([1.0, 2.0])], strange=strange(tmp_path))
    assert_same(answers(folder, info_of(folder), X), as_tensorflow_has_it(folder, X))
    assert theirs == [folder]


@pytest.mark.parametrize("more", [with_state, with_optimizer], ids=lambda make: make.__name__)
def test_generators_and_optimizers_are_right_whoever_restores_them(tmp_path, more):
    import tensorflow as tf

    folder = held(tmp_path / "saved", [tf.Variable([1.0, 2.0])], more=more(tmp_path))
    assert_same(answers(folder, info_of(folder), X), as_tensorflow_has_it(folder, X))


def test_a_table_answers_also_where_its_words_came_late(tmp_path, theirs):
    import tensorflow as tf

    table, bias = with_words(tmp_path), tf.Variable(5, dtype=tf.int64)
    module = tf.Module()
    module.table, module.bias = table, bias
    specs = [tf.TensorSpec([None], tf.string, name="x")]
    module.serve = tf.function(lambda x: {"y": table.lookup(x) + bias}, input_signature=specs, autograph=False)
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures={"serving_default": module.serve})
    given = {"x": np.array([b"b", b"a"], object)}
    info = ModelInfo("tensorflow", "savedmodel", (), (TensorSpec("y", "INT64", (-1,)),), batched=True, pure=True, code=True)
    arrivals, there = growing(tmp_path / "saved", tmp_path / "coming", ["saved_model.pb", "variables/variables.index", "assets", DATA])
    assert answers(there, info, given, arrivals=arrivals)["y"].tolist() == [6, 5]
    assert theirs == [there]


def test_a_model_of_tensorflow_1_is_left_to_tensorflow(tmp_path, theirs):
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None], name="x")
        weight = v1.get_variable("w", initializer=[3.0], use_resource=True)
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, str(tmp_path / "saved"), {"x": x}, {"y": x * weight})
    info = ModelInfo("tensorflow", "savedmodel", (), (TensorSpec("y", "FP32", (-1,)),), batched=True, pure=True, code=True)
    assert answers(tmp_path / "saved", info, {"x": np.ones(2, np.float32)})["y"].tolist() == [3, 3]
    assert theirs == [tmp_path / "saved"]


def test_a_model_that_reads_files_is_refused_before_tensorflow_sees_it(tmp_path, monkeypatch):
    import tensorflow as tf

    models.saved_model(tmp_path, lambda x: {"y": tf.io.read_file(x)}, [tf.TensorSpec((), tf.string, name="x")])
    info = ModelInfo("tensorflow", "savedmodel", (), (), batched=False, pure=True, code=True)
    monkeypatch.setattr(tf.saved_model, "load", lambda *_, **__: pytest.fail("TensorFlow saw it"))
    with pytest.raises(HostileModelError, match="ReadFile"):
        load(tmp_path, info)


def test_a_data_file_that_was_cut_off_is_a_bad_model(tmp_path):
    folder = models.savedmodel_rows(tmp_path, 100_000)
    info = info_of(folder)
    with (folder / DATA).open("r+b") as file:
        file.truncate(50_000)
    with pytest.raises(BadModelError, match="can't be loaded as a SavedModel"):
        load(folder, info)


# --- files that come


def growing(whole, coming, order, step=300_000):
    """Copies of the files, which come in this order, in steps; the folder is renamed at the end. Its arrivals, and its last place."""
    files = {path.relative_to(whole).as_posix(): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    turn = {name: next((index for index, each in enumerate(order) if name.startswith(each)), -1) for name in files}
    for name, data in files.items():
        (coming / name).parent.mkdir(parents=True, exist_ok=True)
        (coming / name).write_bytes(bytes(len(data)))
    arrivals, there = Arrivals(), coming.with_name("there")

    def come():
        arrivals.begun(coming)
        for name in sorted(files, key=lambda name: (turn[name], name)):
            for start in range(0, len(files[name]), step):
                part = files[name][start : start + step]
                with (coming / name).open("r+b") as file:
                    file.seek(start)
                    file.write(part)
                arrivals.grew(name, start + len(part))
        coming.rename(there)
        arrivals.finish()

    threading.Thread(target=come, daemon=True).start()
    return arrivals, there


ORDERS = {
    "small ones first": ["fingerprint.pb", "variables/variables.index", "saved_model.pb", DATA],
    "by name": ["fingerprint.pb", "saved_model.pb", DATA, "variables/variables.index"],
    "weights first": [DATA, "variables/variables.index", "saved_model.pb", "fingerprint.pb"],
}


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_nothing_is_read_before_it_came(tmp_path, order):
    import tensorflow as tf

    chance = np.random.default_rng(11)
    sizes = (700_000, 10, 1_200_000, 300_000, 1, 600_000)
    folder = held(tmp_path / "saved", [tf.Variable(chance.standard_normal(size).astype(np.float32)) for size in sizes])
    wanted = as_tensorflow_has_it(folder, X)
    info = info_of(folder)
    arrivals, there = growing(folder, tmp_path / "coming", order)
    assert_same(answers(there, info, X, arrivals=arrivals), wanted)


class OnlyOnDemand(Arrivals):
    """Files that hold zeros where nobody waited for their bytes."""

    def __init__(self, whole, coming):
        super().__init__()
        self._whole_folder, self._coming = whole, coming
        for path in [path for path in whole.rglob("*") if path.is_file()]:
            zeros = coming / path.relative_to(whole)
            zeros.parent.mkdir(parents=True, exist_ok=True)
            zeros.write_bytes(bytes(path.stat().st_size))
        self.begun(coming)

    def wait(self, file, nbytes):
        with (self._coming / file).open("r+b") as opened:
            opened.write((self._whole_folder / file).read_bytes()[:nbytes])
        self.grew(file, nbytes)


@pytest.mark.usefixtures("ours")
def test_all_that_is_read_was_waited_for_also_what_few_models_have(tmp_path):
    import tensorflow as tf

    values = [tf.Variable(tf.range(400_000.0)), tf.Variable(3.0)]
    folder = held(tmp_path / "saved", values, tf.saved_model.SaveOptions(save_debug_info=True))
    assert (folder / "debug/saved_model_debug_info.pb").stat().st_size
    arrivals = OnlyOnDemand(folder, tmp_path / "coming")
    assert_same(answers(tmp_path / "there", info_of(folder), X, arrivals=arrivals), as_tensorflow_has_it(folder, X))


@pytest.mark.usefixtures("ours")
def test_the_graph_is_built_and_weights_are_read_while_the_last_bytes_are_still_to_come(tmp_path, monkeypatch):
    import tensorflow as tf

    folder = held(tmp_path, [tf.Variable(tf.range(400_000.0) + index) for index in range(4)])
    info, wanted = info_of(folder), as_tensorflow_has_it(folder, X)
    arrivals, built, read = Arrivals(), threading.Event(), threading.Semaphore(0)
    signature, tensor = tensorflow._signature, savedmodel_restoring._tensor
    monkeypatch.setattr(tensorflow, "_signature", lambda *given: (signature(*given), built.set())[0])
    monkeypatch.setattr(savedmodel_restoring, "_tensor", lambda *given: (read.release(), tensor(*given))[1])
    arrivals.begun(folder)
    nbytes = (folder / DATA).stat().st_size
    for name in ("saved_model.pb", "fingerprint.pb", "variables/variables.index"):
        arrivals.grew(name, (folder / name).stat().st_size)
    arrivals.grew(DATA, 3 * 1_600_000 + 500_000)
    done = []
    loading = threading.Thread(target=lambda: done.append(answers(folder, info, X, arrivals=arrivals)))
    loading.start()
    assert built.wait(PROMPT)
    assert all(read.acquire(timeout=PROMPT) for _ in range(3))
    assert not done
    arrivals.grew(DATA, nbytes)
    loading.join(PROMPT)
    assert_same(done[0], wanted)


def test_files_that_stop_coming_fail_the_load_with_their_error(tmp_path):
    folder = models.savedmodel_rows(tmp_path, 5_000_000)
    info = info_of(folder)
    arrivals = Arrivals()
    arrivals.begun(folder)
    for name in ("saved_model.pb", "fingerprint.pb", "variables/variables.index"):
        arrivals.grew(name, (folder / name).stat().st_size)
    timer = threading.Timer(0.2, arrivals.fail, (HostileModelError("a source lied"),))
    timer.start()
    with pytest.raises(HostileModelError, match="a source lied"):
        load_arriving(folder, info, 1, arrivals)
    timer.join()


def test_a_folder_that_is_thrown_away_for_one_of_before_is_loaded_from_there(tmp_path):
    folder = models.savedmodel_rows(tmp_path / "there", 3_000_000)
    info = info_of(folder)
    shutil.copytree(folder, tmp_path / "coming")
    arrivals = Arrivals()
    arrivals.begun(tmp_path / "coming")
    for name in ("saved_model.pb", "fingerprint.pb", "variables/variables.index"):
        arrivals.grew(name, (folder / name).stat().st_size)

    def replaced():
        shutil.rmtree(tmp_path / "coming")
        arrivals.finish()

    timer = threading.Timer(0.2, replaced)
    timer.start()
    given = {"x": np.ones((1, 4), np.float32)}
    assert_same(answers(folder, info, given, arrivals=arrivals), as_tensorflow_has_it(folder, given))
    timer.join()


@pytest.mark.parametrize("step", ["check", "bundle", "load"])
def test_it_may_be_thrown_away_at_any_moment(tmp_path, monkeypatch, step):
    import tensorflow as tf

    folder = models.savedmodel_rows(tmp_path / "there", 10_000)
    info, given = info_of(folder), {"x": np.ones((1, 4), np.float32)}
    wanted = as_tensorflow_has_it(folder, given)
    shutil.copytree(folder, tmp_path / "coming")
    module = tf.saved_model if step == "load" else savedmodel
    work = getattr(module, step)
    arrivals = Arrivals()
    arrivals.begun(tmp_path / "coming")
    for name in ("saved_model.pb", "fingerprint.pb", "variables/variables.index"):
        arrivals.grew(name, (folder / name).stat().st_size)

    def replaced(*arguments, **more):
        if (tmp_path / "coming").exists():
            shutil.rmtree(tmp_path / "coming")
            arrivals.finish()
        return work(*arguments, **more)

    monkeypatch.setattr(module, step, replaced)
    assert_same(answers(folder, info, given, arrivals=arrivals), wanted)


def test_the_bundle_says_where_each_key_lies_and_what_the_objects_are(tmp_path):
    folder = models.savedmodel_rows(tmp_path, 10_000)
    bundle = savedmodel.bundle(folder)
    assert {tensor.file for tensor in bundle.tensors.values()} == {DATA}
    assert sorted(bundle.tensors) == [f"variables_of_the_test/{index}/.ATTRIBUTES/VARIABLE_VALUE" for index in range(2)]
    assert b"variables_of_the_test" in bundle.object_graph(folder)
