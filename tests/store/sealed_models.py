"""Encrypted models for the tests of the store, published as the manager publishes them."""

from store_models import INFO, LAB

from tether import store
from tether.store.layout import Piece
from tether.store.manifest import Manifest, signed_message
from tether.store.sealing import Sealing
from tether.store.weights import tensor_arrays
from tether.types import StoredTensor


def publish_sealed(repository, files, tensors=(), *, name="digits", by=LAB):
    """`files`: relative path → bytes. Gives what became of it."""
    intake = Sealing(repository, by.public).intake(name)
    arrays = []
    for path, data in files.items():
        ranges = [Piece(tensor.offset, tensor.nbytes) for tensor in tensors if tensor.file == path]
        segments = []
        for offset, nbytes in store.layout.cut(len(data), ranges):
            digest = store.digest_of(data[offset : offset + nbytes])
            intake.put(digest, data[offset : offset + nbytes])
            segments.append(store.Segment(digest, 0, nbytes))
        arrays.append(store.ArrayEntry(f"files/{path}", "uint8", (len(data),), tuple(segments)))
    arrays = sorted(arrays + tensor_arrays(arrays, list(tensors)), key=lambda array: array.path)
    manifest = intake.finished(Manifest(framework="onnx", entry=next(iter(files)), info=INFO, arrays=tuple(arrays)))
    published = repository.publish(name, manifest, by.public, by.sign(signed_message(manifest)))
    intake.settle()
    return published


def tensor_file(values, path="model.bin", align=64):
    """A file of tensors, and where they lie in it."""
    data, tensors = bytearray(b"header"), []
    for name, value in values.items():
        data += bytes(-len(data) % align)
        tensors.append(StoredTensor(name, str(value.dtype), value.shape, path, len(data), value.nbytes))
        data += value.tobytes()
    return bytes(data), tensors
