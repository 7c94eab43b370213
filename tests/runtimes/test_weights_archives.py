"""The index of PyTorch's archives: every tensor's bytes as PyTorch loads them, each pickle read and none run, lies about sizes refused."""

import json
import random
import struct
import warnings
import zipfile

import hostile_archives as hostile
import pytest
import runtime_models as models
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_reading import bounded, mutations, read_tensors, survives

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.weights import CONVERTED, boundaries, read_index
from tether.testing.requirements import needs

FLOATS = struct.pack("<4f", 1, 2, 3, 4)
KINDS = {"exported.pt2": "pt2", "script.pt": "torchscript", "state.pth": "torchscript", "checkpoint.pt": "torchscript"}
STATE = {"w": hostile.tensor(), "b": hostile.tensor("1", 2, 0, (2,), (1,))}
STORAGES = {"0": FLOATS, "1": FLOATS[:8]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One module, saved in each way, and what PyTorch has in it."""
    import torch

    folder = tmp_path_factory.mktemp("saved")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 4, 3)
            self.fc = torch.nn.Linear(4, 2)
            self.tied = torch.nn.Linear(4, 2)
            self.tied.weight = self.fc.weight
            self.register_buffer("turned", torch.arange(12.0).reshape(3, 4).t())
            self.register_buffer("brain", torch.ones(3, dtype=torch.bfloat16))
            self.constant = torch.full((2, 2), 3.0)

        def forward(self, x):
            tail = self.tied(torch.ones(4)) + self.turned.sum() + self.constant.sum() + self.brain.sum()
            return self.fc(self.conv(x).mean((2, 3))) + tail

    net, x = Net().eval(), (torch.ones(1, 1, 8, 8),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself: deprecated tracing, tensors that share a storage
        torch.export.save(torch.export.export(net, x), folder / "exported.pt2")
        torch.jit.trace(net, x).save(str(folder / "script.pt"))
    state = net.state_dict()
    torch.save(state, folder / "state.pth")
    optimizer = torch.optim.Adam(net.parameters())
    net(*x).sum().backward()
    optimizer.step()
    torch.save({"model": state, "epoch": 3, "optimizer": optimizer.state_dict()}, folder / "checkpoint.pt")
    moments = {
        f"optimizer.state.{number}.{name}": value
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    wanted = {
        "exported.pt2": state | {"constant": net.constant},
        "script.pt": state | {"CONSTANTS.c0": net.constant},
        "state.pth": state,
        "checkpoint.pt": {f"model.{name}": value for name, value in state.items()} | moments,
    }
    return folder, wanted


def as_bytes(tensor):
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def compare(path, wanted, folder):
    found, data = read_tensors(path, KINDS.get(path.name, "torchscript"), folder)
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in found} == {
        name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in wanted.items()
    }
    assert {tensor.name: data(tensor) for tensor in found} == {name: as_bytes(value) for name, value in wanted.items()}
    return found


@needs("torch")
@pytest.mark.parametrize("name", KINDS)
def test_every_tensor_is_as_pytorch_loads_it(saved, tmp_path, name):
    import torch

    folder, wanted = saved
    path = folder / name
    if name == "exported.pt2":
        program = torch.export.load(path)
        values = {**program.state_dict, **program.constants}
    elif name == "script.pt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            loaded = torch.jit.load(str(path)).state_dict()
        values = loaded | {"CONSTANTS.c0": torch.full((2, 2), 3.0)}
    elif name == "state.pth":
        values = torch.load(path, weights_only=True)
    else:
        loaded = torch.load(path, weights_only=True)
        states = loaded["optimizer"]["state"].items()
        values = {f"model.{key}": value for key, value in loaded["model"].items()}
        values |= {f"optimizer.state.{number}.{key}": value for number, inner in states for key, value in inner.items()}
    assert set(values) == set(wanted[name])
    found = compare(path, values, tmp_path)
    assert {tensor.name.removeprefix("model.") for tensor in found if tensor.file == CONVERTED} == {"turned"}
    places = {tensor.name.removeprefix("model."): tensor.offset for tensor in found}
    assert places["tied.weight"] == places["fc.weight"]
    assert all(tensor.offset % 64 == 0 for tensor in found)


@needs("torch")
def test_each_element_type_and_each_kind_of_view_is_read(tmp_path):
    import torch

    names = (
        "uint8 int8 int16 int32 int64 bool float16 float32 float64 bfloat16 complex64 complex128 uint16 uint32 uint64 "
        "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
    )
    values = {name: torch.arange(6).to(getattr(torch, name)).reshape(2, 3) for name in names.split()}
    values |= {
        "turned": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "repeated": torch.ones(1).expand(5, 6),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        "slice": torch.arange(100.0)[10:20],
        "steps": torch.arange(100)[5:50:3],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "a name with / and ü": torch.ones(2),
        "channels last": torch.arange(4000.0 * 300).reshape(1, 300, 40, 100).contiguous(memory_format=torch.channels_last),
    }
    torch.save(values, tmp_path / "all.pt")
    compare(tmp_path / "all.pt", values, tmp_path)


@needs("torch")
def test_what_torch_saves_beside_tensors_is_no_obstacle(tmp_path):
    import torch

    values = {
        "w": torch.ones(3),
        "set": {1, 2},
        "device": torch.device("cpu"),
        "size": torch.Size([1]),
        "type": torch.float32,
        "none": None,
    }
    values["nested"] = [{"x": torch.zeros(2)}, (torch.ones(1), "text", b"bytes", 1 + 2j)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantization is deprecated
        values["quantized"] = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        torch.save(values, tmp_path / "m.pt")
    assert {tensor.name for tensor in read_index(tmp_path / "m.pt", "torchscript")} == {"w", "nested.0.x", "nested.1.0"}


@needs("torch")
def test_a_scripted_module_with_code_and_lists_is_read(tmp_path):
    import torch

    module, _ = models.torch_rows(2400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(module).save(str(tmp_path / "m.pt"))
    compare(tmp_path / "m.pt", module.state_dict(), tmp_path)


@needs("torch")
@pytest.mark.parametrize("name", KINDS)
def test_a_pickle_planted_in_any_member_is_refused_by_the_members_name(saved, tmp_path, name):
    path = saved[0] / name
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    for planted in members:
        bad = tmp_path / name
        raw = any(part in planted for part in hostile.RAW) and planted.rpartition("/")[2].rpartition("_")[2].isdecimal()
        bad.write_bytes(hostile.zip_of([hostile.Entry(each, hostile.PLANT if each == planted else data) for each, data in members.items()]))
        if raw:  # numbers, whatever they look like
            survives(bad, KINDS[name], tmp_path)
            continue
        with pytest.raises(BadModelError) as caught:
            read_index(bad, KINDS[name])
        assert planted.partition("/")[2] in str(caught.value) or planted.endswith("byteorder")


@needs("torch")
@pytest.mark.parametrize("name", KINDS)
def test_what_torch_saved_and_was_cut_off_is_a_bad_model(saved, tmp_path, name):
    data = (saved[0] / name).read_bytes()
    for percent in range(0, 100, 2):
        (tmp_path / name).write_bytes(data[: len(data) * percent // 100])
        with pytest.raises(BadModelError):
            read_index(tmp_path / name, KINDS[name])
        assert boundaries(tmp_path / name, KINDS[name]) == {}


@needs("torch")
@pytest.mark.parametrize("name", KINDS)
def test_mutations_of_what_torch_saved_are_refused_or_within_the_file(saved, tmp_path, name):
    good = (saved[0] / name).read_bytes()
    chance = random.Random(f"mutated {name}")
    for _ in range(120):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        (tmp_path / name).write_bytes(data)
        survives(tmp_path / name, KINDS[name], tmp_path)


# --- without PyTorch


def write(folder, data, name="m.pt"):
    path = folder / name
    path.write_bytes(data)
    return path


def read(folder, data, name="m.pt"):
    path = write(folder, data, name)
    return read_tensors(path, "pt2" if name.endswith("pt2") else "torchscript", folder)


def test_a_state_dict_that_was_put_together_by_hand_is_read(tmp_path):
    found, data = read(tmp_path, hostile.archive(STATE, STORAGES))
    assert [(tensor.name, tensor.shape, data(tensor)) for tensor in found] == [("w", (4,), FLOATS), ("b", (2,), FLOATS[:8])]


LIES = {
    "a repeated element, 2^40 times": hostile.tensor(shape=(1 << 40,), strides=(0,)),
    "a repeated element, 2^40 times in two axes": hostile.tensor(shape=(1 << 20, 1 << 20), strides=(0, 0)),
    "elements behind the storage": hostile.tensor(shape=(5,)),
    "elements behind the storage by strides": hostile.tensor(shape=(2,), strides=(4,)),
    "an offset behind the storage": hostile.tensor(offset=1),
    "an empty tensor behind the storage": hostile.tensor(offset=1 << 40, shape=(0,)),
    "a storage of more than there is": hostile.tensor(count=5),
    "a storage of less than there is": hostile.tensor(count=3),
    "a storage of another type": hostile.tensor(storage="DoubleStorage"),
    "a storage of 2^61": hostile.tensor(count=1 << 61),
}
NONSENSE = {
    "a negative offset": hostile.tensor(offset=-1),
    "a negative stride": hostile.tensor(strides=(-1,)),
    "a negative size": hostile.tensor(shape=(-4,)),
    "a size of 2^62": hostile.tensor(shape=(1 << 62, 8), strides=(8, 1)),
    "33 axes": hostile.tensor(shape=(1,) * 33, strides=(1,) * 33),
    "strides of another rank": hostile.tensor(strides=(1, 1)),
    "a storage that is not there": hostile.tensor("7"),
    "a storage in another place": hostile.tensor("../data.pkl"),
    "sparse": hostile.tensor(function="_rebuild_sparse_tensor"),
    "a wrapped subclass": hostile.tensor(function="_rebuild_wrapper_subclass"),
    "no storage": hostile.named("torch._utils", "_rebuild_tensor_v2") + b"(K\x01K\x01K\x01K\x01tR",
    "no arguments": hostile.named("torch._utils", "_rebuild_tensor_v2") + b")R",
    "a storage that is a text": hostile.named("torch._utils", "_rebuild_tensor_v2") + b"(" + hostile.text("0") + b"QK\x00))tR",
    "no element type": hostile.tensor(storage="UntypedStorage", count=16, function="_rebuild_tensor_v3"),
}


@pytest.mark.parametrize("kind", LIES)
def test_lies_about_sizes_are_refused_not_followed(tmp_path, kind):
    path = write(tmp_path, hostile.archive({"w": LIES[kind]}, STORAGES))
    with bounded(), pytest.raises(HostileModelError, match="w"):
        read_index(path, "torchscript")


@pytest.mark.parametrize("kind", NONSENSE)
def test_tensors_that_are_none_are_refused(tmp_path, kind):
    data = hostile.archive({"w": NONSENSE[kind]}, STORAGES)
    with bounded(), pytest.raises(BadModelError):
        read(tmp_path, data)


def test_small_views_that_repeat_are_written_out(tmp_path):
    found, data = read(tmp_path, hostile.archive({"w": hostile.tensor(shape=(3, 4), strides=(0, 1))}, STORAGES))
    assert data(found[0]) == FLOATS * 3


def test_many_views_of_a_large_storage_are_refused_before_they_are_read(tmp_path):
    count = 8 << 20
    view = hostile.tensor(count=count, shape=(2,), strides=(count - 1,))
    path = write(tmp_path, hostile.archive({f"t{number}": view for number in range(2000)}, {"0": bytes(4 * count)}))
    with bounded(20), pytest.raises(HostileModelError, match="views"):
        read_tensors(path, "torchscript", tmp_path)


PLANTS = {
    "as data.pkl": {"data.pkl": hostile.PLANT},
    "behind data.pkl": {"data.pkl": hostile.state_dict(STATE) + hostile.PLANT},
    "in an extra file": {"extra/notes.txt": hostile.PLANT},
    "in a version": {"version": hostile.PLANT},
    "in byteorder": {"byteorder": hostile.PLANT},
    "as a second pickle": {"more.pkl": hostile.PLANT},
    "in code": {"code/__torch__.py": hostile.PLANT},
    "in debug information": {"code/__torch__.py.debug_pkl": hostile.PLANT},
    "in text form": {"extra/notes.txt": b"cos\nsystem\n(S'id'\ntR."},
}


@pytest.mark.parametrize("kind", PLANTS)
def test_a_planted_pickle_is_refused(tmp_path, kind):
    members = {"data.pkl": hostile.state_dict(STATE), "byteorder": b"little", "data/0": FLOATS, "data/1": FLOATS[:8]}
    with pytest.raises(BadModelError):
        read(tmp_path, hostile.torch_zip(members | PLANTS[kind]))


WHOLE = {
    "a bomb": hostile.zip_of(
        [
            hostile.Entry("m/data.pkl", hostile.state_dict({"w": hostile.tensor(count=24 << 20, shape=(24 << 20,))})),
            hostile.Entry("m/data/0", bytes(96 << 20), 8),
        ]
    ),
    "names that differ in capitals": hostile.archive(STATE, STORAGES | {"X": b"", "x": b""}),
    "operations on files": hostile.archive(STATE, STORAGES, code____torch__=b"x = torch.from_file('/etc/passwd')"),
    "operations on files, spaced": hostile.archive(STATE, STORAGES, code____torch__=b"ops . aten . save(x, 'f')"),
    "endless sharing": hostile.torch_zip(
        {"data.pkl": b"\x80\x02]q\x00" + b"".join(b"0]q%ch%cah%ca" % (at, at - 1, at - 1) for at in range(1, 100)) + b".", "data/0": FLOATS}
    ),
    "a list in itself": hostile.torch_zip({"data.pkl": b"\x80\x02]q\x00h\x00a.", "data/0": FLOATS}),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_archives_that_only_an_attack_has_are_refused(tmp_path, kind):
    path = write(tmp_path, WHOLE[kind])
    with bounded(), pytest.raises(HostileModelError):
        read_index(path, "torchscript")


def test_the_form_before_torch_1_6_says_to_save_again_and_its_pickles_are_read(tmp_path):
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    with pytest.raises(BadModelError, match="save it again"):
        read(tmp_path, magic + b"\x80\x02M\xe9\x03." + b"\x80\x02}." + hostile.state_dict({}) + b"\x80\x02]." + FLOATS)
    with pytest.raises(HostileModelError, match=r"os\.system"):
        read(tmp_path, magic + b"\x80\x02M\xe9\x03." + b"\x80\x02}." + hostile.PLANT)
    with pytest.raises(HostileModelError, match=r"os\.system"):
        read(tmp_path, hostile.PLANT, "pytorch_model.pt")


def test_a_pickle_among_the_files_of_a_custom_model_is_refused_if_it_attacks(tmp_path):
    (tmp_path / "model.py").write_text("")
    write(tmp_path, hostile.calling("mine", "Net"), "net.bin")
    write(tmp_path, hostile.archive(STATE, STORAGES), "weights.ckpt")
    assert {tensor.file for tensor in read_index(tmp_path, "custom")} == {"weights.ckpt"}
    write(tmp_path, hostile.PLANT, "more.bin")
    with pytest.raises(HostileModelError, match=r"more\.bin"):
        read_index(tmp_path, "custom")


def test_big_endian_archives_say_what_to_do(tmp_path):
    with pytest.raises(BadModelError, match="big-endian"):
        read(tmp_path, hostile.archive(STATE, STORAGES, byteorder=b"big"))


def exported(config, *, constants=None, **more):
    members = {
        "archive_format": b"pt2",
        "byteorder": b"little",
        "data/weights/model_weights_config.json": config,
        "data/weights/weight_0": FLOATS,
    }
    members |= {"data/constants/model_constants_config.json": constants} if constants else {}
    return hostile.torch_zip(members | {name.replace("__", "/"): data for name, data in more.items()})


def payload(path="weight_0", *, pickled=False, **changes):
    meta = {"dtype": 7, "sizes": [{"as_int": 4}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}, "layout": 7} | changes
    return {"path_name": path, "is_param": True, "use_pickle": pickled, "tensor_meta": meta}


def config_of(**payloads):
    return json.dumps({"config": payloads}).encode()


EXPORTED = {
    "no JSON": exported(b"{"),
    "deep JSON": exported(b"[" * 100_000),
    "another JSON": exported(b'{"config": []}'),
    "a path that leads out": exported(config_of(w=payload("../../byteorder"))),
    "a member that is not there": exported(config_of(w=payload("weight_1"))),
    "sparse": exported(config_of(w=payload(layout=1))),
    "behind the member": exported(config_of(w=payload(sizes=[{"as_int": 5}]))),
    "repeated 2^40 times": exported(config_of(w=payload(sizes=[{"as_int": 1 << 40}], strides=[{"as_int": 0}]))),
    "a size that is an expression": exported(config_of(w=payload(sizes=[{"as_expr": {"expr_str": "s0"}}]))),
    "a size of 2^70": exported(config_of(w=payload(sizes=[{"as_int": 1 << 70}]))),
    "one member as two types": exported(config_of(w=payload(), v=payload(dtype=5))),
    "a pickled weight": exported(config_of(w=payload(pickled=True)), data__weights__weight_0=hostile.PLANT),
    "a pickled weight in an archive": exported(
        config_of(w=payload(pickled=True)), data__weights__weight_0=hostile.torch_zip({"data.pkl": hostile.PLANT})
    ),
    "a pickled object": exported(
        b'{"config": {}}', constants=config_of(o=payload("opaque_obj_0")), data__constants__opaque_obj_0=hostile.PLANT
    ),
    "a custom object": exported(
        b'{"config": {}}',
        constants=config_of(o=payload("custom_obj_0")),
        data__constants__custom_obj_0=hostile.torch_zip({"data.pkl": hostile.PLANT}),
    ),
    "an attack in the sample inputs": hostile.torch_zip(
        {"archive_format": b"pt2", "data/sample_inputs/model.pt": hostile.torch_zip({"data.pkl": hostile.PLANT})}
    ),
    "an attack in the weights of the old form": hostile.torch_zip(
        {"archive_format": b"pt2", "data/weights/model.pt": hostile.torch_zip({"data.pkl": hostile.PLANT})}
    ),
    "an archive three deep": hostile.torch_zip(
        {
            "archive_format": b"pt2",
            "data/weights/model.pt": hostile.torch_zip(
                {"archive_format": b"pt2", "data/weights/model.pt": hostile.archive(STATE, STORAGES)}
            ),
        }
    ),
    "compiled code": exported(config_of(w=payload()), data__aotinductor__model__x=b"\x7fELF"),
    "operations on files": exported(config_of(w=payload()), models__model=b'{"target": "torch.ops.aten.from_file.default"}'),
    "operations on files, in escapes": exported(
        config_of(w=payload()), models__model=rb'{"target": "torch.ops.aten.\u0066rom_file.default"}'
    ),
}


@pytest.mark.parametrize("kind", EXPORTED)
def test_exported_programs_that_lie_are_refused(tmp_path, kind):
    path = write(tmp_path, EXPORTED[kind], "m.pt2")
    with bounded(), pytest.raises(BadModelError):
        read_index(path, "pt2")


def test_exported_programs_of_both_forms_are_read(tmp_path):
    for number, data in enumerate(
        (
            exported(config_of(w=payload(), view=payload(sizes=[{"as_int": 2}], storage_offset={"as_int": 1}))),
            hostile.torch_zip({"archive_format": b"pt2", "data/weights/model.pt": hostile.archive(STATE, STORAGES)}),
            hostile.zip_of(
                [
                    hostile.Entry("version", b"8.4"),
                    hostile.Entry("serialized_exported_program.json", b"{}"),
                    hostile.Entry("serialized_state_dict.pt", hostile.archive(STATE, STORAGES)),
                    hostile.Entry("serialized_constants.pt", b""),
                ]
            ),
        )
    ):
        found, data_of = read(tmp_path, data, f"m{number}.pt2")
        assert {tensor.name: data_of(tensor) for tensor in found} == {"w": FLOATS} | (
            {"view": FLOATS[4:12]} if not number else {"b": FLOATS[:8]}
        )


@given(mutations(hostile.archive(STATE, STORAGES)))
@settings(max_examples=200)
def test_any_mutation_is_refused_or_within_the_file(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    survives(write(folder, data, "mutated.pt"), "torchscript", folder)


@given(st.integers(0, 3), st.lists(st.integers(-2, 9), max_size=3), st.lists(st.integers(-2, 9), max_size=3))
@settings(max_examples=100)
def test_any_view_is_refused_or_has_as_many_bytes_as_its_shape(tmp_path_factory, offset, shape, strides):
    folder = tmp_path_factory.getbasetemp()
    found = survives(
        write(folder, hostile.archive({"w": hostile.tensor(offset=offset, shape=shape, strides=strides)}, STORAGES)), "torchscript", folder
    )
    assert found is None or 4 * max(1, *shape, 1) >= found[0].nbytes // 100


def test_the_index_of_five_thousand_tensors_takes_a_moment(tmp_path, measured):
    import time

    names = {f"layers.{number}.weight": hostile.tensor(str(number)) for number in range(5000)}
    path = write(tmp_path, hostile.archive(names, {str(number): FLOATS for number in range(5000)}))
    with bounded(5, 60 << 20):
        started = time.perf_counter()
        assert len(read_index(path, "torchscript")) == 5000
        measured(f"index of a torch archive of 5,000 tensors: {(time.perf_counter() - started) * 1000:.0f} ms")
