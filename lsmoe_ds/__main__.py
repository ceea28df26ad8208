"""Run the ``lsmoe`` command: also as ``python -m lsmoe_ds``."""

import signal
import sys

from lsmoe_ds import interrupt


def main() -> None:
    """Run the command. Signal handlers are installed before large modules are imported."""
    if sys.argv[1:2] == ["train"]:
        interrupt.leave_before_training()
    else:
        interrupt.clean_up_and_leave()
    try:
        from lsmoe_ds.cli import main as run

        run()
    except interrupt.Interrupted as asked:
        interrupt.say(f"stopped by {interrupt.name_of(asked.number)}")
        sys.exit(interrupt.status_of(asked.number))
    finally:
        for each in interrupt.SIGNALS:  # only the interpreter's shutdown is left, which removes our handlers
            if each == signal.SIGINT or signal.getsignal(each) is not signal.SIG_DFL:
                signal.signal(each, signal.SIG_IGN)


if __name__ == "__main__":
    main()
