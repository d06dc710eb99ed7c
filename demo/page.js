// What the page does by itself, without the server: pictures dropped or pasted anywhere, following a growing reply,
// the language that was chosen, and going on with its conversation when it is loaded again.
() => {
    const give = (files) => {
        const field = document.querySelector("#box input[type=file]");
        if (!field || !files.length) return false;
        const moved = new DataTransfer();
        for (const file of files) moved.items.add(file);
        field.files = moved.files;
        field.dispatchEvent(new Event("change", {bubbles: true}));
        return true;
    };

    // What a component takes it takes first; a file dropped beside it must not replace the page.
    document.addEventListener("dragover", (event) => {
        if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
    });
    document.addEventListener("drop", (event) => {
        if (event.defaultPrevented || !event.dataTransfer?.files.length) return;
        event.preventDefault();
        give(event.dataTransfer.files);
    });
    document.addEventListener("paste", (event) => {
        if (event.defaultPrevented || event.target.closest?.("#box")) return;
        if (give(event.clipboardData?.files ?? [])) event.preventDefault();
    });

    // The box is emptied when the reply to its message begins. What was typed behind the message until then is kept.
    let typed = "";
    document.addEventListener("input", ({target}) => {
        if (target.matches?.("#box textarea")) typed = target.value.trimStart();
    }, true);
    const keepTyped = () => requestAnimationFrame(() => {  // when all of the page is as it should be
        const box = document.querySelector("#box textarea");
        const asked = [...document.querySelectorAll("#chat [data-testid=user]")].at(-1)?.textContent.trim();
        const left = asked && typed.startsWith(asked) ? typed.slice(asked.length).trimStart() : "";
        typed = "";
        if (!left || box.value) return;
        box.value = left;
        box.dispatchEvent(new Event("input", {bubbles: true}));
    });

    // The end of the conversation stays in view until its reader scrolls up, and again from the next question on.
    let follows = true, questions = 0;
    const end = () => {
        const area = document.querySelector("#chat .bubble-wrap");
        const asked = document.querySelectorAll("#chat .user-row").length;
        if (asked > questions) {
            follows = true;
            keepTyped();
        }
        questions = asked;
        if (area && follows) area.scrollTop = area.scrollHeight;
    };
    document.addEventListener("scroll", ({target}) => {
        if (!target.matches?.("#chat .bubble-wrap")) return;
        follows = target.scrollHeight - target.scrollTop - target.clientHeight < 40;
    }, true);
    document.addEventListener("load", ({target}) => target.closest?.("#chat") && end(), true);
    new MutationObserver(end).observe(document.querySelector("#chat"),
        {childList: true, subtree: true, characterData: true});

    const KEY = "visualrwkv-language";
    const stored = (use) => { try { return use(localStorage); } catch { return null; } };  // a browser may forbid it
    // A page that is loaded again, by hand or by Gradio after its connection was cut, tells what it was called before. A
    // copy of a tab that is still open has nothing to tell.
    const PAGE = "visualrwkv-page";
    const ofTab = (use) => { try { return use(sessionStorage); } catch { return null; } };
    window.visualrwkv = {
        former: () => ofTab((place) => place.getItem(PAGE)) ?? "",
        remember: (name) => {
            ofTab((place) => place.removeItem(PAGE));
            window.addEventListener("pagehide", () => ofTab((place) => place.setItem(PAGE, name)));
        },
        language: () => ["en", "zh"].find((known) => known === stored((place) => place.getItem(KEY))) ?? null,
        choose: (language) => { stored((place) => place.setItem(KEY, language)); },
    };
}
