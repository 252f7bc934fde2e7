"""`python -m worker.dispatcher`: the dispatcher, until SIGTERM."""

from worker.dispatcher.loop import main

if __name__ == "__main__":
    main()
