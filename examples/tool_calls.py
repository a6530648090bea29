"""A function that the model calls: its arguments, its result, and the answer that follows."""

import json

from openai import OpenAI

CAPITALS = {"France": "Paris", "Japan": "Tokyo"}


def capital(country: str) -> str:
    """The capital of a country."""
    return CAPITALS[country]


tools = [
    {
        "type": "function",
        "function": {
            "name": "capital",
            "description": "The capital of a country.",
            "parameters": {
                "type": "object",
                "properties": {"country": {"enum": list(CAPITALS)}},
                "required": ["country"],
            },
        },
    }
]
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
messages = [{"role": "user", "content": "What is the capital of Japan?"}]

# "required" forces a call; with "auto" the model decides.
tool_choice = "required"
while True:
    answer = client.chat.completions.create(
        model="persimmon-demo", messages=messages, tools=tools, tool_choice=tool_choice, temperature=0, max_tokens=60
    )
    message = answer.choices[0].message
    messages.append(message)
    if not message.tool_calls:
        break
    for call in message.tool_calls:
        arguments = json.loads(call.function.arguments)
        result = capital(**arguments)
        print(f"{call.function.name}({arguments}) -> {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    tool_choice = "none"
print(message.content)
