"""The floor: the least HTTP server in Python that answers the protocol. `python floor.py FOLDER PORT`.

uvicorn, Starlette and ONNX Runtime in one process, the model run on the event loop: the price of HTTP and Python alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

HEADER = "inference-header-content-length"


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


SESSIONS = {path.stem: session(path) for path in Path(sys.argv[1]).glob("*.onnx")}


async def infer(request: Request) -> Response:
    name = request.path_params["name"]
    body, length = await request.body(), request.headers.get(HEADER)
    message = orjson.loads(body[: int(length)] if length else body)
    tensor = message["inputs"][0]
    flat = np.frombuffer(body, np.float32, offset=int(length)) if length else np.array(tensor["data"], np.float32)
    (y,) = SESSIONS[name].run(None, {"x": flat.reshape(tensor["shape"])})
    output = {"name": "y", "datatype": "FP32", "shape": y.shape}
    answer = {"model_name": name, "id": message.get("id"), "outputs": [output]}
    if not length:
        output["data"] = y.ravel()
        return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
    output["parameters"] = {"binary_data_size": y.nbytes}
    head = orjson.dumps(answer)
    return Response(head + y.tobytes(), headers={HEADER: str(len(head))}, media_type="application/octet-stream")


app = Starlette(routes=[Route("/v2/models/{name}/infer", infer, methods=["POST"])])
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), loop="uvloop", http="httptools", access_log=False, log_level="warning")
