"""A conversation of two turns."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
messages = [{"role": "user", "content": "What does galaxy mean?"}]
answer = client.chat.completions.create(model="persimmon-demo", messages=messages, temperature=0)
print(answer.choices[0].message.content)

messages.append(answer.choices[0].message)
messages.append({"role": "user", "content": "Give me a synonym."})
answer = client.chat.completions.create(model="persimmon-demo", messages=messages, temperature=0)
print(answer.choices[0].message.content)
