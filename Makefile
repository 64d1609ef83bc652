# make demo: films in, movie out, on a bare machine.   make test: everything that is checked.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
DEMO_FILMS := bikes.mp4 carphone_pristine.mp4 bigbuckbunny.mp4
WEIGHTS := $(HOME)/.cache/moviedreamer/weights

.PHONY: setup weights demo test lint clean

setup: $(VENV)/.ready

# UV_FIND_LINKS: where pip is told of local wheels, uv is told of them too.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV)" >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv
	UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

weights: setup
	$(BIN)/moviedreamer weights pull

# The clips are 4 to 10 s long, so keyframes are taken every 5th frame here instead of every 30th.
demo: weights
	$(BIN)/moviedreamer run $(addprefix $(WEIGHTS)/demo_films/,$(DEMO_FILMS)) \
	  --workspace $(DEMO)/workspace --out $(DEMO)/movie.mp4 --story examples/story.json --set keyframes.every_n_frames=5

test: weights lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(DEMO) *.egg-info
