"""The routes. Each reads its request, asks ``convert`` for the translation and answers."""
