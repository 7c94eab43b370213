"""Encrypted models for the tests of the store, published as the manager publishes them."""

from store_models import INFO, LAB

from tether.store.format import layout
from tether.store.format.layout import Piece
from tether.store.format.manifest import ArrayEntry, Manifest, Segment, digest_of, signed_message
from tether.store.format.weights import tensor_arrays
from tether.store.sealing import Sealing
from tether.types import StoredTensor


def publish_sealed(repository, files, tensors=(), *, name="digits", by=LAB):
    """`files`: relative path → bytes. Gives what became of it."""
    intake = Sealing(repository, by.public).intake(name)
    arrays = []
    for path, data in files.items():
        ranges = [Piece(tensor.offset, tensor.nbytes) for tensor in tensors if tensor.file == path]
        segments = []
        for offset, nbytes in layout.cut(len(data), ranges):
            digest = digest_of(data[offset : offset + nbytes])
            intake.put(digest, data[offset : offset + nbytes])
            segments.append(Segment(digest, 0, nbytes))
        arrays.append(ArrayEntry(f"files/{path}", "uint8", (len(data),), tuple(segments)))
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
