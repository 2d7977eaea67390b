"""The date in chat templates: a moment that is given is shown as transformers shows the time of the call."""

import pickle
from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from qstar.prompting import PromptFormat

MOMENT = datetime(2024, 2, 5, 3, 4, 5, 678)
DIRECTIVES = "%d %b %Y %-d %H:%M %A %j %e %F %T %%d %^a %Ey %Od %%%d 100%% %f|%Z|%y%m%d%%"
TEMPLATES = {
    "as Llama's": "{%- if strftime_now is defined %}\n  {{- strftime_now('%d %b %Y') }}\n{%- endif %}\n{{ messages }}",
    "every kind of directive": "  {% set x = 1 %}\n{{ strftime_now('" + DIRECTIVES + "') }} {{ messages }}",
    "called from a macro": "\n{% set f = '%B' %}{% macro date() %}{{ strftime_now(f) }}{% endmacro %}\n {{ date() }}\n",
    "by another name": "{% set now = strftime_now %} {{ now('%d') | upper ~ messages[0].content }}",
    "without a date": "{{ messages[0].content }}",
}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_moment_is_shown_as_the_time_would_be(demo_pair, tmp_path, monkeypatch, name, own):
    tokenizer, path = demo_pair.tokenizer_theta, tmp_path / "template.jinja"
    path.write_text(TEMPLATES[name])
    if own:
        monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[name])

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None) -> datetime:
            return MOMENT

    def shown(moment: datetime | None) -> str:
        prompt_format = pickle.loads(pickle.dumps(PromptFormat("auto" if own else str(path), moment=moment)))
        return tokenizer.decode(prompt_format.encode(tokenizer, [{"role": "user", "content": "Hello"}]))

    at_that_moment = shown(MOMENT)
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    assert at_that_moment == shown(None)


def test_without_a_moment_it_is_the_time_of_the_call(demo_pair, monkeypatch):
    monkeypatch.setattr(demo_pair.tokenizer_theta, "chat_template", "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}")
    before = datetime.now()
    ids = PromptFormat().encode(demo_pair.tokenizer_theta, [{"role": "user", "content": "Hello"}])
    assert before <= datetime.fromisoformat(demo_pair.tokenizer_theta.decode(ids)) <= datetime.now()
