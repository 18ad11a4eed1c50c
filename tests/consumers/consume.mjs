// Runs a GGUF in node-llama-cpp or in QMD, on one thread: JSON in (the file argv[2]), JSON out (argv[3]).
import { readFileSync, writeFileSync } from "node:fs";

async function qmd({ model, queries }) {
  const { LlamaCpp } = await import("./node_modules/@tobilu/qmd/dist/llm.js");
  const qmd = new LlamaCpp({ generateModel: model });
  (await qmd.ensureLlama()).maxThreads = 1; // its least is 4, which is slow on two cores
  const found = [];
  for (const query of queries) found.push(await qmd.expandQuery(query));
  await qmd.dispose();
  return found;
}

async function llama({ model, texts, prompts, steps }) {
  const { getLlama, LlamaLogLevel } = await import("node-llama-cpp");
  const runtime = await getLlama({ gpu: false, build: "never", maxThreads: 1, logLevel: LlamaLogLevel.error });
  const loaded = await runtime.loadModel({ modelPath: model });
  const context = await loaded.createContext({ contextSize: 1024 });
  const sequence = context.getSequence();
  const continued = [];
  for (const prompt of prompts) {
    await sequence.clearHistory();
    const found = [];
    for await (const token of sequence.evaluate(prompt, { temperature: 0 })) {
      if (loaded.isEogToken(token)) break;
      found.push(token);
      if (found.length === steps) break;
    }
    continued.push(found);
  }
  return { tokens: texts.map((text) => Array.from(loaded.tokenize(text, true))), continued };
}

const wanted = JSON.parse(readFileSync(process.argv[2], "utf8"));
const found = await { qmd, llama }[wanted.what](wanted);
writeFileSync(process.argv[3], JSON.stringify(found));
process.exit(0);
