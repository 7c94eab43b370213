"""What TensorFlow saves, and what of it can be served."""

import numpy as np
import pytest
import runtime_models as models

from tether.errors import BadModelError
from tether.runtimes import inspect, load
from tether.testing.requirements import needs

pytestmark = [
    needs("tensorflow"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


def test_a_saved_model_without_the_signature_says_how_to_save_one(tmp_path):
    import tensorflow as tf

    tf.saved_model.save(tf.Module(), str(tmp_path))
    with pytest.raises(BadModelError, match="no signature 'serving_default'"):
        inspect(tmp_path)


def test_a_model_that_counts_is_not_pure(tmp_path):
    import tensorflow as tf

    seen = tf.Variable(0.0)
    models.saved_model(tmp_path, lambda x: {"y": x + seen.assign_add(1.0)}, [tf.TensorSpec((None,), tf.float32, name="x")], [seen])
    info = inspect(tmp_path)
    assert info.pure is False
    model = load(tmp_path, info)
    assert [model.run({"x": np.zeros(1, np.float32)})["y"][0] for _ in range(2)] == [1, 2]
    model.close()


def test_a_saved_model_that_is_damaged_is_a_bad_model(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01garbage")
    with pytest.raises(BadModelError, match="can't be loaded as a SavedModel"):
        inspect(tmp_path)


def test_a_keras_file_that_is_damaged_is_a_bad_model(tmp_path):
    (tmp_path / "m.keras").write_bytes(b"PK\x03\x04")
    with pytest.raises(BadModelError, match="can't be loaded by Keras"):
        inspect(tmp_path / "m.keras")


def test_a_keras_lambda_is_refused(tmp_path):
    import keras

    x = keras.Input((2,), name="x")
    keras.Model(x, keras.layers.Lambda(lambda value: value + 1)(x)).save(tmp_path / "m.keras")
    with pytest.raises(BadModelError, match="can't be loaded by Keras"):
        inspect(tmp_path / "m.keras")


def test_a_sequential_keras_model_answers_under_its_last_layers_name(tmp_path):
    import keras

    keras.Sequential([keras.Input((2,), name="x"), keras.layers.Dense(3), keras.layers.Softmax(name="scores")]).save(tmp_path / "m.keras")
    info = inspect(tmp_path / "m.keras")
    assert ([spec.name for spec in info.inputs], [(spec.name, spec.shape) for spec in info.outputs]) == (["x"], [("scores", (-1, 3))])
    model = load(tmp_path / "m.keras", info)
    np.testing.assert_allclose(model.run({"x": np.ones((2, 2), np.float32)})["scores"].sum(axis=1), 1, rtol=1e-5)
    model.close()
