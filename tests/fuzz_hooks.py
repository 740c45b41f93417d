"What schemathesis leaves out, loaded by name (SCHEMATHESIS_HOOKS)."
import schemathesis


@schemathesis.hook
def filter_case(ctx, case):
    "A server must ignore header fields it doesn't know (RFC 9110, 5.1); that it accepts one is no fault."
    return "x-schemathesis-unknown-property" not in {name.lower() for name in case.headers or {}}
