"""A plain FastAPI server around diffusers, as tutorials build it: one warm pipeline, one request at a time.

`python -m benchmarks.rivals.plain_fastapi PORT`
"""

import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, Response

from benchmarks.rivals.painter import Painter


def build(painter: Painter) -> FastAPI:
    app, turn = FastAPI(), threading.Lock()

    @app.post("/generate")
    def generate(wish: dict[str, Any]) -> Response:
        with turn:  # a pipeline is not safe in two threads
            [png] = painter.paint([wish])
        return Response(png, media_type="image/png")

    return app


if __name__ == "__main__":
    uvicorn.run(build(Painter()), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
