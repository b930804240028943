"""LoRA on a base in floats, int8, NF4 and int4: `python -m experiments.all quantised`, under the name it had."""

from experiments.all import Config, main

if __name__ == "__main__":
    main(Config(("quantised",)))
