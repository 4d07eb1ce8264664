// Token ids of texts by the tokenizer of transformers.js.
// usage: node token_ids.mjs ENVIRONMENT FOLDER NAME < texts.json
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [environment, folder, name] = process.argv.slice(2);
const found = createRequire(path.resolve(environment, "package.json")).resolve("@huggingface/transformers");
const { AutoTokenizer, env } = await import(pathToFileURL(found));
env.allowRemoteModels = false;
env.localModelPath = folder;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const texts = JSON.parse(fs.readFileSync(0));
console.log(JSON.stringify(texts.map((text) => tokenizer(text, { return_tensor: false }).input_ids)));
