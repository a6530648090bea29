"""An answer that is printed while it is written."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
messages = [{"role": "user", "content": "What does galaxy mean?"}]
for chunk in client.chat.completions.create(model="persimmon-demo", messages=messages, temperature=0, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
