# The recipes CI runs.

default: check

# Format, lints, docs and tests: the whole gate.
check:
    .ci/run

# Every test.
test *args:
    scripts/test {{args}}

# A picture from a cluster of five workers.
demo prompt="red heart":
    scripts/demo "{{prompt}}"

# Licences and bans (needs cargo-deny).
deny:
    cargo deny check
