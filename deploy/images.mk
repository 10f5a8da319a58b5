# Container images without Docker; not part of `make test`. IMAGES="api worker sender" builds all three.
IMAGES ?= api

.PHONY: images
images: .venv/pip.stamp
	deploy/images.sh $(IMAGES)
