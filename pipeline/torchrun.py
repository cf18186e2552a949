"""torchrun, ended when whoever launched it ends: the processes that it starts are in sessions of their own."""

from torch.distributed.run import main

from pipeline import lifeline

if __name__ == "__main__":
    lifeline.hold()
    main()
