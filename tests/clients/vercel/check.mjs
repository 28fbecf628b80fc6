// Vercel's AI SDK with its OpenAI provider, which speaks the Responses API.
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const openai = createOpenAI({ baseURL: `${process.env.INLAID_URL}/v1`, apiKey: "none" });
const model = openai("demo");
const question = "What is the weather in Oslo?";
const city = z.enum(["Oslo", "Rome"]);
const get_weather = tool({
  description: "Get the weather in a city.",
  inputSchema: z.object({ city }),
  execute: async () => "sunny",
});

const feature = async (name, check, tries = 1) => {
  for (let number = 1; number <= tries; number++) {
    try {
      if (!(await check())) throw new Error("an empty answer");
      console.log(`${name}\tyes\t`);
      return;
    } catch (error) {
      console.error(error);
      if (number === tries) console.log(`${name}\tno\t${String(error).replace(/\s+/g, " ").slice(0, 200)}`);
    }
  }
};

await feature("chat", async () => (await generateText({ model, prompt: "Hello, I am Anna." })).text);
await feature("streaming", async () => {
  let text = "";
  for await (const part of streamText({ model, prompt: "Hello, I am Anna." }).textStream) text += part;
  return text;
});
await feature("tools", async () => {
  const auto = await generateText({ model, prompt: question, tools: { get_weather }, stopWhen: stepCountIs(3) });
  const forced = await generateText({
    model, prompt: question, tools: { get_weather }, toolChoice: "required", stopWhen: stepCountIs(2),
  });
  return auto.steps.length && forced.steps[0].toolCalls[0].toolName === "get_weather" && forced.steps.length === 2;
});
await feature("streamed tools", async () => {
  const run = streamText({ model, prompt: question, tools: { get_weather }, toolChoice: "required" });
  let called = false;
  for await (const part of run.fullStream) called = called || part.type === "tool-call";
  return called;
});
await feature("agent", async () => {
  const run = await generateText({
    model: openai("tools"), prompt: question, tools: { get_weather }, stopWhen: stepCountIs(3),
  });
  return run.steps.length === 2 && run.text.includes("sunny");
}, 3);
await feature("structured output", async () => {
  const made = await generateObject({ model, schema: z.object({ city, sunny: z.boolean() }), prompt: question });
  return made.object.city;
});
await feature("conversation", async () => {
  const messages = [{ role: "user", content: "My name is Anna." }];
  const first = await generateText({ model, messages });
  messages.push(...first.response.messages, { role: "user", content: "Who am I?" });
  return (await generateText({ model, messages })).text;
});
