// What programs in JavaScript do with a server: node client.cjs http://127.0.0.1:8000/v1 MODEL, with openai in NODE_PATH.
"use strict";
const assert = require("node:assert/strict");
const OpenAI = require("openai");

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({baseURL, apiKey: "none", maxRetries: 0});
const messages = [{role: "user", content: "hello"}];
const greedy = {model, temperature: 0, max_tokens: 12, ignore_eos: true};

async function main() {
  const models = [];
  for await (const one of client.models.list()) models.push(one.id);
  assert.equal(models[0], model);

  const whole = await client.chat.completions.create({messages, ...greedy});
  assert.equal(whole.choices[0].finish_reason, "length");
  assert.equal(whole.usage.completion_tokens, 12);

  const options = {stream: true, stream_options: {include_usage: true}};
  let text = "", usage = null;
  for await (const chunk of await client.chat.completions.create({messages, ...greedy, ...options})) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(usage.total_tokens, whole.usage.total_tokens);

  const runner = client.chat.completions.stream({messages, ...greedy});
  assert.equal((await runner.finalChatCompletion()).choices[0].message.content, text);

  const several = await client.completions.create({prompt: ["hello", "the quick fox"], logprobs: 1, n: 2, ...greedy});
  assert.deepEqual(several.choices.map((choice) => choice.index), [0, 1, 2, 3]);
  assert.equal(several.choices[0].logprobs.tokens.length, 12);

  const stream = await client.completions.create({prompt: "hello", stream: true, ...greedy, max_tokens: 100});
  for await (const chunk of stream) {
    assert.equal(chunk.object, "text_completion");
    stream.controller.abort();
    break;
  }

  await assert.rejects(client.chat.completions.create({messages, ...greedy, n: 1e6}), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "n");
    return true;
  });
  await assert.rejects(client.models.retrieve("nobody"), OpenAI.NotFoundError);
  console.log("all is well");
}

main();
