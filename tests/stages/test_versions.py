import json

from tests.stages.versions import RECORD, current


def test_changed_stages_raise_their_version_or_say_that_results_stay():
    recorded, now = json.loads(RECORD.read_text()), current()
    changed = [name for name in now if now[name] != recorded.get(name)]
    assert not changed, (
        f"the source of {', '.join(changed)} changed: raise SPEC.version if results change, then (or, if they stay "
        "the same, only) run `python -m tests.stages.versions`"
    )
