"""A text that the model continues, with the most probable tokens at each position."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
completion = client.completions.create(
    model="persimmon-demo",
    prompt="human: What does galaxy mean?\n\nadept: It means a",
    max_tokens=4,
    temperature=0,
    logprobs=2,
)
print(completion.choices[0].text)
for tokens in completion.choices[0].logprobs.top_logprobs:
    print({token: round(logprob, 1) for token, logprob in tokens.items()})
