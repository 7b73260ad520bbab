"""Parts of OpenAI's objects that several endpoints share: log-probabilities, traces, usage."""

from collections.abc import Callable, Sequence
from typing import Any

from linalign import TokenLogprob, Usage
from linalign.alignment_core.output import IMPOSSIBLE
from linalign.server.exchange import Applied


def logprob_object(report: TokenLogprob, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    """OpenAI's form of one token's log-probabilities."""

    def one(id: int, logprob: float) -> dict[str, Any]:
        content = token_bytes(id)
        return {
            "token": content.decode(errors="replace"),
            "logprob": max(logprob, IMPOSSIBLE),
            "bytes": list(content),
        }

    return {**one(report.token_id, report.logprob), "top_logprobs": [one(*pair) for pair in report.top]}


def trace_object(report: TokenLogprob, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    """The log-probability of a token under each policy and, if the request has top_logprobs, each policy's best tokens.
    Without a base branch there is only one policy.
    """
    aligned, trace = logprob_object(report, token_bytes), report.trace
    fields = {"token": aligned["token"], "bytes": aligned["bytes"], "logprob": aligned["logprob"]}
    if trace is None:
        missing = {"base_logprob": None, "plausible_tokens": None, "kl": None}
        return {**fields, "principled_logprob": aligned["logprob"], **missing}
    principled, base = logprob_object(trace.principled, token_bytes), logprob_object(trace.base, token_bytes)
    fields |= {"principled_logprob": principled["logprob"], "base_logprob": base["logprob"]}
    fields |= {"plausible_tokens": trace.num_plausible, "kl": trace.kl}
    if report.top:
        policies = {"aligned": aligned, "principled": principled, "base": base}
        fields["top"] = {name: policy["top_logprobs"] for name, policy in policies.items()}
    return fields


def usage_object(usages: Sequence[Usage], applied: Applied | None) -> dict[str, Any]:
    """The usage of all choices together. OpenAI's fields count the prompt once, alignment_details all branches.

    applied: What the request is aligned with.
    """
    return {
        **token_counts(usages[0].prompt_tokens, sum(usage.completion_tokens for usage in usages)),
        # That of the choice that ran first, because the others reuse its prompt.
        "prompt_tokens_details": {"cached_tokens": min(usage.prompt_cached_tokens for usage in usages)},
        "alignment_details": {
            "branches": usages[0].branches,
            "branch_tokens_computed": sum(usage.branch_tokens_computed for usage in usages),
            "prefix_cached_tokens": sum(usage.prefix_cached_tokens for usage in usages),
            **(applied.details() if applied else {}),
        },
    }


def token_counts(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
