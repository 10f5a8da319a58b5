// OpenAI's own package for JavaScript, unmodified, at a service: node images.mjs BASE_URL. Prints what came of each call.
import fs from "node:fs";
import OpenAI, { toFile } from "openai";

const [baseURL, source, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
const prompt = "a red heart";
const calls = {};

const png = (name) => toFile(fs.createReadStream(name), "image.png", { type: "image/png" });
const isPng = (text) => Buffer.from(text, "base64").subarray(1, 4).toString() === "PNG";

calls["models.list"] = (await client.models.list()).data.map((model) => model.id);
calls["models.retrieve"] = (await client.models.retrieve("emoji")).id;

const made = await client.images.generate({ prompt, n: 2, quality: "low", size: "64x64" });
calls["images.generate"] = made.data.map((image) => isPng(image.b64_json));

const events = [];
for await (const event of await client.images.generate({ prompt, stream: true, partial_images: 1, num_inference_steps: 100 })) {
  events.push(event.type);
}
calls["images.generate stream"] = events;

const edited = await client.images.edit({ image: await png(source), mask: await png(mask), prompt });
calls["images.edit"] = edited.data.map((image) => isPng(image.b64_json));

const varied = await client.images.createVariation({ image: await png(source), response_format: "url" });
calls["images.createVariation"] = (await fetch(varied.data[0].url)).status;

try {
  await client.images.generate({ prompt, size: "1024x1024" });
} catch (error) {
  calls["images.generate refused"] = [error.constructor.name, error.status, error.param];
}
console.log(JSON.stringify(calls));
