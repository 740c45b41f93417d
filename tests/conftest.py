"""What all tests rely on."""
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's background ignores Ctrl-C, and tests that press it would wait for ever
    signal.signal(signal.SIGINT, signal.default_int_handler)
