"""The API described: `/openapi.json`, made of the routes themselves, and the page at `/docs`.

    schemas      what answers look like, as pydantic models
    operations   what each route takes and gives
    document     routes and operations as one OpenAPI 3.1 document
    page         the document as one page of HTML, with nothing fetched from elsewhere

A test compares the document with the routes, and its schemas with what a live service answers.
"""
