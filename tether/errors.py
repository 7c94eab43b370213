"""Every error Tether raises: one tree, stable codes, HTTP and gRPC status.

    TetherError
    ├── RequestError       the caller can mend it            4xx
    ├── UnavailableError   it may work when tried again       5xx (503, 504, 507)
    ├── RemoteError        another party sent something wrong 502
    └── InternalError      our bug                            500

A leaf also inherits the builtin that Python code expects (`UnknownModelError` is a `LookupError`).  `code` is released and never
changes: programs match on it, people search for it.  The first argument is the message and says what to do next; whatever else an
error knows stands behind it in `args`, so every error survives pickling and a trip over HTTP (`from_code`).
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "BadAddressError",
    "BadEnvelopeError",
    "BadInputError",
    "BadInvitationError",
    "BadKeyError",
    "BadModelError",
    "BadNameError",
    "BadScopeError",
    "BadSignatureError",
    "BadTermsError",
    "ChunkAlteredError",
    "ChunkMissingError",
    "ClusterKeyMissingError",
    "ConfigError",
    "ConflictError",
    "DeadlineExceededError",
    "DigestMismatchError",
    "EngineClosedError",
    "EngineError",
    "EngineMisusedError",
    "FeedRefusedError",
    "ForbiddenError",
    "FormatTooNewError",
    "HeadersTooLargeError",
    "HostileModelError",
    "InternalError",
    "LabRunningError",
    "LoadFailedError",
    "LockLostError",
    "LockedModelError",
    "MalformedFeedError",
    "MalformedManifestError",
    "MalformedRecordError",
    "MalformedRequestError",
    "ManagerLeavingError",
    "MemoryFullError",
    "MethodNotAllowedError",
    "MissingBlobsError",
    "MissingDependencyError",
    "ModelDiedError",
    "ModelFailedError",
    "ModelTooLargeError",
    "NoDeviceError",
    "NoLabError",
    "NoModelFileError",
    "NoSpaceError",
    "NoWorkerError",
    "NotANumberError",
    "NotFoundError",
    "NotWriterError",
    "PayloadTooLargeError",
    "PeerFailedError",
    "PeerLeavingError",
    "PeerNotFoundError",
    "PeerUnreachableError",
    "PoisonInputError",
    "PortBusyError",
    "ProtocolError",
    "QueueFullError",
    "RangeError",
    "RemoteError",
    "RequestError",
    "RequestTimeoutError",
    "ScopeStillOpenError",
    "ServiceUnavailableError",
    "StagingFullError",
    "StartFailedError",
    "StoreError",
    "StreamLostError",
    "TetherError",
    "TooManyTriesError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnknownAliasError",
    "UnknownFrameworkError",
    "UnknownMethodError",
    "UnknownModelError",
    "UnknownVersionError",
    "UnknownWorkerError",
    "UnsupportedError",
    "UntrustedCodeError",
    "WorkerLostError",
    "WrongBytesError",
    "from_code",
]


class TetherError(Exception):
    """The root. `args[0]` is the message; further `args` are the data that the leaf documents."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "UNKNOWN"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.args = args  # OSError keeps two of three for itself

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else self.code


class RequestError(TetherError):
    """The request can't be answered as it stands; mend it and send it again."""

    code = "bad_request"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class BadNameError(RequestError, ValueError):
    """A model name, alias or version that does not follow the rules of `ModelRef`."""

    code = "bad_name"


class BadInputError(RequestError, ValueError):
    """An input tensor does not fit the model: name, datatype, rank, size."""

    code = "bad_input"


class MalformedRequestError(RequestError, ValueError):
    """The bytes of a request are not what the protocol allows."""

    code = "malformed_request"


class PayloadTooLargeError(RequestError):
    """The body is over the limit."""

    code = "payload_too_large"
    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class HeadersTooLargeError(RequestError):
    """The headers are over the limit."""

    code = "headers_too_large"
    http_status = 431
    grpc_status = "RESOURCE_EXHAUSTED"


class RequestTimeoutError(RequestError, TimeoutError):
    """The client took too long to send its request."""

    code = "request_timeout"
    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"


class NotFoundError(RequestError, LookupError):
    """Nothing is at this path."""

    code = "not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class UnknownModelError(NotFoundError):
    """No model of this name that the caller may see."""

    code = "unknown_model"


class UnknownVersionError(NotFoundError):
    """The model has no such version."""

    code = "unknown_version"


class UnknownAliasError(NotFoundError):
    """The model has no such alias."""

    code = "unknown_alias"


class UnknownWorkerError(NotFoundError):
    """The lab has no worker of this name now."""

    code = "unknown_worker"


class UnknownMethodError(NotFoundError):
    """The peer answers no calls of this name."""

    code = "unknown_method"


class MethodNotAllowedError(RequestError):
    """The path exists, the verb does not."""

    code = "method_not_allowed"
    http_status = 405
    grpc_status = "UNIMPLEMENTED"


class UnsupportedError(RequestError):
    """Valid, but not something this server or model does."""

    code = "unsupported"
    http_status = 501
    grpc_status = "UNIMPLEMENTED"


class RangeError(RequestError, ValueError):
    """A range of bytes that begins behind the end. `args[1]` is the size of the whole."""

    code = "bad_range"
    http_status = 416
    grpc_status = "OUT_OF_RANGE"


class UnauthenticatedError(RequestError, PermissionError):
    """No API key, or not a valid one."""

    code = "unauthenticated"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class ForbiddenError(RequestError, PermissionError):
    """The caller is known and may not do this."""

    code = "forbidden"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class UntrustedCodeError(ForbiddenError):
    """The model's format can run code and its publisher is not trusted for code."""

    code = "untrusted_code"


class LockedModelError(ForbiddenError):
    """The model is encrypted and this lab has no key that opens it. `args[1]` is the id of the model key, where one is known."""

    code = "locked_model"


class BadKeyError(RequestError, ValueError):
    """A public key that is none: not 64 hex digits, or not a point of the curve."""

    code = "bad_key"


class BadAddressError(RequestError, ValueError):
    """What stands for a lab, or the secret of an invitation, was mistyped or copied in part."""

    code = "bad_address"


class BadScopeError(RequestError, ValueError):
    """A scope that does not follow the grammar of `security/scopes.py`."""

    code = "bad_scope"


class BadTermsError(RequestError, ValueError):
    """What an invitation is to be good for makes no sense: how often, or how long."""

    code = "bad_terms"


class BadInvitationError(ForbiddenError):
    """The invitation does not admit: unknown, expired, used up or revoked."""

    code = "bad_invitation"


class TooManyTriesError(RequestError, PermissionError):
    """Wrong invitations were tried too often. `args[1]`: seconds until a try is looked at again."""

    code = "too_many_tries"
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"


class UnknownFrameworkError(RequestError, ValueError):
    """The framework was not given and can't be told from the files, or is none of ours."""

    code = "unknown_framework"


class NoModelFileError(RequestError, FileNotFoundError):
    """The path does not exist, is empty, or holds no model."""

    code = "no_model_file"


class BadModelError(RequestError, ValueError):
    """The model's files can't be parsed or loaded."""

    code = "bad_model"
    http_status = 422


class HostileModelError(BadModelError):
    """The model's files hold what no exporter writes, only an attack: refused wherever they lie."""

    code = "hostile_model"


class ModelFailedError(RequestError, RuntimeError):
    """The model itself raised on this input."""

    code = "model_failed"
    http_status = 422


class NotANumberError(RequestError, ArithmeticError):
    """A version that is being rolled out answered NaN to an input that has none."""

    code = "not_a_number"
    http_status = 422


class PoisonInputError(RequestError, RuntimeError):
    """The input ended the process of the model twice and is not run any more: for an hour, or until an operator says otherwise."""

    code = "poison_input"
    http_status = 422


class MissingDependencyError(RequestError, ImportError):
    """A library that the model or the feature needs is not installed; the message says which."""

    code = "missing_dependency"
    http_status = 424
    grpc_status = "FAILED_PRECONDITION"


class ConflictError(RequestError):
    """The state of things does not allow it now."""

    code = "conflict"
    http_status = 409
    grpc_status = "FAILED_PRECONDITION"


class ScopeStillOpenError(ConflictError):
    """A scope was to be taken from a peer, and another one of its would still open the same. Nothing was taken. `args[1]` lists those."""

    code = "scope_still_open"


class MissingBlobsError(ConflictError):
    """A manifest names blobs that the store lacks: `args[1]` lists their digests. Upload them, then send the manifest again."""

    code = "missing_blobs"


class LabRunningError(ConflictError):
    """A lab already runs on this data folder."""

    code = "lab_running"


class LockLostError(ConflictError):
    """The file that the writer of a store holds a lock on was deleted or replaced: it writes no more and has to be started again."""

    code = "lock_lost"


class NoLabError(RequestError, LookupError):
    """No lab runs where one was looked for."""

    code = "no_lab"
    http_status = 404
    grpc_status = "NOT_FOUND"


class DigestMismatchError(RequestError, ValueError):
    """Bytes that were sent under a digest they do not have."""

    code = "digest_mismatch"


class ConfigError(RequestError, ValueError):
    """A setting has no valid value."""

    code = "bad_config"


class PortBusyError(RequestError, OSError):
    """A port that was asked for by number is taken; the message names its holder."""

    code = "port_busy"
    http_status = 409
    grpc_status = "FAILED_PRECONDITION"


class FormatTooNewError(RequestError):
    """The data folder was written by a newer Tether."""

    code = "format_too_new"
    http_status = 409
    grpc_status = "FAILED_PRECONDITION"


class UnavailableError(TetherError):
    """It can't be done now; the same call may work later."""

    code = "unavailable"
    http_status = 503
    grpc_status = "UNAVAILABLE"


class NoWorkerError(UnavailableError):
    """No worker can hold this model now."""

    code = "no_worker"


class WorkerLostError(UnavailableError):
    """The worker went away before it answered."""

    code = "worker_lost"


class ModelDiedError(WorkerLostError):
    """The process of the model ended by itself while it ran the request. `args[1]`: whether the input may be what ended it."""

    code = "model_died"


class LoadFailedError(UnavailableError):
    """The model could not be brought into memory."""

    code = "load_failed"


class QueueFullError(UnavailableError):
    """More requests wait than the limit allows."""

    code = "queue_full"


class DeadlineExceededError(UnavailableError, TimeoutError):
    """The answer did not come within the caller's deadline."""

    code = "deadline_exceeded"
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class ServiceUnavailableError(UnavailableError, ConnectionError):
    """A part of the lab (gateway, orchestrator, manager) does not answer."""

    code = "service_unavailable"


class EngineClosedError(ServiceUnavailableError):
    """The swarm's engine was closed or suspended while a call waited, or has not been started."""

    code = "engine_closed"


class PeerNotFoundError(UnavailableError, ConnectionError):
    """Nobody announces this public key now. `args[1]` is hyperdht's code."""

    code = "peer_not_found"


class PeerUnreachableError(UnavailableError, ConnectionError):
    """The peer is known, but no stream to it came about: it refused, or no hole could be punched. `args[1]` is hyperdht's code."""

    code = "peer_unreachable"


class StreamLostError(ServiceUnavailableError):
    """A stream to a peer broke: the peer cut it, or the network did. `args[1]` is UDX's code (`ECONNRESET`, `ETIMEDOUT`)."""

    code = "stream_lost"


class NotWriterError(ServiceUnavailableError):
    """This manager follows another one, or its lease ran out. Nothing was done: the writer can be asked."""

    code = "not_writer"


class ManagerLeavingError(ServiceUnavailableError):
    """The manager is about to end. Nothing was done: who calls again is answered by the next one."""

    code = "manager_leaving"


class PeerLeavingError(ServiceUnavailableError):
    """The process of a peer is about to end and did nothing of what it was asked, and no other one of it came."""

    code = "peer_leaving"


class StartFailedError(UnavailableError):
    """The lab, or one of its services, did not come up."""

    code = "start_failed"


class NoSpaceError(UnavailableError, OSError):
    """The disk is full; nothing was changed."""

    code = "no_space"
    http_status = 507
    grpc_status = "RESOURCE_EXHAUSTED"


class NoDeviceError(UnavailableError):
    """The model is to run on a GPU, or on none, and no worker of the lab is like that."""

    code = "no_device"


class MemoryFullError(UnavailableError):
    """All models in the worker's memory are in use, and none made room in time for this one."""

    code = "memory_full"


class ModelTooLargeError(UnavailableError):
    """The model takes more memory than the worker may use for models, or than pinned ones leave."""

    code = "model_too_large"
    http_status = 507
    grpc_status = "RESOURCE_EXHAUSTED"


class StagingFullError(UnavailableError):
    """A peer staged as much as it may without publishing it. Nothing was written."""

    code = "staging_full"
    http_status = 507
    grpc_status = "RESOURCE_EXHAUSTED"


class StoreError(UnavailableError, OSError):
    """The disk or the folder refused an operation of the store (read-only, I/O error)."""

    code = "store_failed"


class ChunkMissingError(StoreError):
    """A blob that a manifest names is not in any pack. `args[1]` is its digest, `args[2]` the zarr path that needed it."""

    code = "chunk_missing"


class ChunkAlteredError(StoreError):
    """A blob's bytes do not have its digest. `args[1]` is the digest, `args[2]` the zarr path that needed it."""

    code = "chunk_altered"


class ClusterKeyMissingError(StoreError):
    """The cluster key that a model key is wrapped by is not in the folder of keys. `args[1]` is its id."""

    code = "cluster_key_missing"


class RemoteError(TetherError):
    """Another party sent something that is not valid; nothing of it was used."""

    code = "remote_error"
    http_status = 502
    grpc_status = "ABORTED"


class BadSignatureError(RemoteError, ValueError):
    """A signature does not fit what it signs."""

    code = "bad_signature"
    http_status = 400


class MalformedManifestError(RemoteError, ValueError):
    """A manifest breaks a rule of the format."""

    code = "malformed_manifest"
    http_status = 400


class BadEnvelopeError(RemoteError, ValueError):
    """Sealed keys that can't be opened with this lab's identity, or hold something else than keys."""

    code = "bad_envelope"
    http_status = 400


class ProtocolError(RemoteError, ValueError):
    """A peer broke a rule of a protocol, or a limit: the connection to it is cut."""

    code = "protocol_error"


class WrongBytesError(ProtocolError):
    """A peer gave other bytes than the digest says that they are: it is not asked again."""

    code = "wrong_bytes"


class PeerFailedError(RemoteError, RuntimeError):
    """A peer answered a call with an error that is none of ours. `args[1]` is the error's code, where it has one."""

    code = "peer_failed"


class MalformedRecordError(RemoteError, ValueError):
    """What a peer says of itself breaks a rule of the format, or the peer did not sign it."""

    code = "malformed_record"


class MalformedFeedError(RemoteError, ValueError):
    """An entry of a publisher's feed breaks a rule of the format; none of the update was used."""

    code = "malformed_feed"


class FeedRefusedError(RemoteError):
    """A publisher's feed contradicts what was seen of it before. `args[1]`: how (`forked`, `truncated`)."""

    code = "feed_refused"


class InternalError(TetherError):
    """A bug of ours; the log of the service has the traceback."""

    code = "internal"
    grpc_status = "INTERNAL"


class EngineError(InternalError):
    """The swarm's JavaScript raised something that has no name here. `args[1]` is its code, `args[2]` its stack."""

    code = "engine_failed"


class EngineMisusedError(InternalError, RuntimeError):
    """The swarm's engine was used from a second thread or loop, or after a fork: it belongs to the thread that started it."""

    code = "engine_misused"


def _leaves(cls: type[TetherError]) -> dict[str, type[TetherError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found |= _leaves(sub)
    return found


def from_code(code: str, *args: Any) -> TetherError:
    """The error of the tree that has this code; an unknown code (a newer server) becomes a plain `TetherError` that keeps the message."""
    return _leaves(TetherError).get(code, TetherError)(*args)
