"""LitServe with its own batching around diffusers. `python -m benchmarks.rivals.with_litserve PORT MAX_BATCH_SIZE`

What came together and has equal settings shares a pipeline call; nothing else can, in a server that batches requests.
"""

import sys
from typing import Any

import litserve
from fastapi import Response

from benchmarks.rivals.painter import Painter

TIMEOUT_SECONDS = 0.05  # that a batch which is not full waits for more


class Generate(litserve.LitAPI):  # type: ignore[misc]  # litserve ships no types
    def setup(self, device: str) -> None:
        self.painter = Painter()

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, inputs: Any) -> Any:
        is_batch = isinstance(inputs, list)
        made = self.painter.paint(inputs if is_batch else [inputs])
        return made if is_batch else made[0]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    api = Generate(max_batch_size=int(sys.argv[2]), batch_timeout=TIMEOUT_SECONDS, api_path="/generate")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=600)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
