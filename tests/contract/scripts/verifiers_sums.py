"""A small environment for `verifiers`: one question, an answer, and a second turn."""

from __future__ import annotations

import sys

import verifiers.v1 as vf

PROGRAM = """
import sys
import openai

base_url, api_key, model, prompt = sys.argv[1:]
with openai.OpenAI(base_url=base_url, api_key=api_key) as client:
    messages = [{"role": "user", "content": prompt}]
    for question in ("Are you sure?", None):
        answer = client.chat.completions.create(model=model, messages=messages)
        said = answer.choices[0].message.content or ""
        messages += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": question},
        ]
"""


class Sum(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def length(self, trace: vf.Trace) -> float:
        """Of what was said, in tokens: known from the trace alone."""
        return float(sum(trace.branches[0].sampled_mask))


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    def load(self):
        for question in ("5271", "12 + 30 =", "was it é?"):
            yield Sum(vf.TaskData(prompt=question), self.config.task)


class TwoTurns(vf.Harness[vf.HarnessConfig]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, tool_interception_url=None
    ):
        command = [sys.executable, "-c", PROGRAM, endpoint, secret, ctx.model, data.prompt]
        return await runtime.run_program(command, {})


__all__ = ["Sums", "TwoTurns"]
