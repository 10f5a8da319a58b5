"""litellm's image path, unmodified, at a service: python ask.py BASE_URL. Prints what came of each call, as JSON."""

import base64
import io
import json
import sys

import litellm

BASE_URL = sys.argv[1]
ASKED = {"model": "openai/emoji", "prompt": "a red heart", "api_base": BASE_URL, "api_key": "any", "num_retries": 0}


def png(image):
    return base64.b64decode(image.b64_json)[1:4].decode()


calls = {}
made = litellm.image_generation(**ASKED, n=2, size="64x64", quality="low")
calls["image_generation"] = [png(image) for image in made.data]
source = io.BytesIO(base64.b64decode(made.data[0].b64_json))
source.name = "source.png"
edited = litellm.image_edit(**ASKED, image=source)
calls["image_edit"] = [png(image) for image in edited.data]
try:
    litellm.image_generation(**ASKED, size="1024x1024")
except litellm.BadRequestError as error:
    calls["image_generation refused"] = [type(error).__name__, error.status_code]
print(json.dumps(calls))
