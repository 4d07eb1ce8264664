"""Kinds of made-up sentences: templates, and the values that go into them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Sentences of one kind.

    Attributes:
        things: what a sentence of it may be called.
        templates: name every slot.
        slots: slot: names of its aspect; values, `/` between two ways to say one.
    """

    things: tuple[str, ...]
    templates: tuple[str, ...]
    slots: dict[str, tuple[tuple[str, ...], str]]


FAMILIES = (
    Family(
        ("sentence", "text", "statement"),
        (
            "{who} {did} {where} {when}.",
            "{when}, {who} {did} {where}.",
            "{where}, {who} {did} {when}.",
            "they say that {when} {who} {did} {where}.",
        ),
        {
            "who": (
                ("job", "person", "role"),
                """a nurse/the woman who nurses the sick; a farmer/the man with the cows and the fields; a teacher/our
                school teacher; a pilot/the captain of a plane; a lawyer/the woman who pleads in court; a baker/the man
                who bakes our bread; a soldier/the corporal; a singer/the soprano; a plumber/the man who mends pipes; a
                judge/the magistrate; a fisherman/the woman with the nets; a painter/the portrait artist; a mechanic/the
                man from the garage; a priest/the vicar; a dancer/the ballerina; a banker/the woman from the bank; a
                gardener/the man who keeps the roses; a sailor/the first mate; a chef/the head cook; a tailor/the woman
                who sews suits; a journalist/the reporter; a carpenter/the man who builds tables; a firefighter/the
                woman from the fire brigade; a dentist/the man who pulls teeth""",
            ),
            "did": (
                ("action", "event"),
                """played football/scored a goal; cooked soup/made a stew; bought shoes/paid for a pair of boots; broke
                a leg/fell and fractured a bone; sang a song/hummed a tune; lost the keys/could not find the key; won a
                prize/came first and got a medal; wrote a letter/posted some mail; got married/had a wedding; fell
                asleep/took a nap; caught a thief/stopped a burglar; missed the train/came too late for the train; sold
                a house/found a buyer for the cottage; learned French/took French lessons; climbed a tower/went up all
                the stairs; painted a wall/gave the fence a new colour; cried/burst into tears; drank coffee/had an
                espresso; rode a horse/went riding; repaired a bicycle/mended a flat tyre; planted trees/put seeds into
                the ground; told a joke/made everybody laugh; read a novel/finished a book; went swimming/dived into the
                water""",
            ),
            "where": (
                ("place", "location"),
                """in Paris/near the Eiffel tower; in Cairo/by the pyramids; in London/beside the Thames; in New York/on
                Manhattan; in Tokyo/in Japan; in Moscow/on Red Square; in Rome/near the Colosseum; in Sydney/by the
                opera house in Australia; in Berlin/at the Brandenburg gate; in Delhi/in India; in Rio/on the
                Copacabana; in Athens/in Greece; in Madrid/in the middle of Spain; in Vienna/in Austria; in Istanbul/on
                the Bosporus; in Nairobi/in Kenya; in Toronto/in Canada; in Oslo/on a fjord in Norway; in Lisbon/in
                Portugal; in Beijing/in China; in Dublin/in Ireland; in Prague/by the Charles bridge; in
                Amsterdam/beside a Dutch canal; in Mexico City/in Mexico""",
            ),
            "when": (
                ("time", "period"),
                """at dawn/when the sun came up; at midnight/in the middle of the night; at noon/at twelve o'clock; on
                Christmas day/on the 25th of December; in the summer holidays/during the hot weeks of July; on New
                Year's eve/on the last day of the year; during the war/while the bombs fell; in the middle ages/in the
                13th century; last Monday/at the beginning of the week; on Sunday/at the weekend; in spring/when the
                first flowers came; in the autumn/when the leaves fell; a minute ago/just now; in 1969/in the late
                sixties; next year/twelve months from now; at Easter/on Good Friday""",
            ),
        },
    ),
    Family(
        ("question", "title", "post"),
        (
            "how do I {task} {tool}?",
            "{task} {tool}",
            "best way to {task} {tool}",
            "I cannot {task} {tool}, what is wrong?",
        ),
        {
            "task": (
                ("task", "goal", "problem"),
                """sort a list/put entries into order; read a file line by line/load a text file; draw a chart/make a
                bar plot; send an email/deliver mail; parse a date/turn text into a timestamp; write a unit test/check a
                function with tests; connect to a database/open a database connection; find duplicates/spot repeated
                entries; resize an image/scale a picture; handle errors/catch exceptions; download a page/fetch a
                website; encrypt a password/hash a secret; count words/get word frequencies; undo the last change/go
                back one version; run things in parallel/use several threads; speed up a loop/make it faster; print in
                colour/format the output; remove blanks/strip white space; validate a form/check what users typed in;
                create a menu/add a drop-down; log in users/authenticate people; translate a string/support two
                languages""",
            ),
            "tool": (
                ("technology", "tool", "language"),
                """in Python/with pandas; in Java/with Spring; with C++/using the C++ standard library; in Excel/with
                a spreadsheet formula; in bash/in a shell script; with git/from the git command line; in
                JavaScript/with node.js; in R/with ggplot and the tidyverse; with SQL/in a Postgres query; in
                Matlab/with Simulink; in PHP/with Laravel; in Ruby/on Rails; in Haskell/with a monad; in Lua/with a
                Lua table; on Android/in Kotlin; on an iPhone/in Swift; in Rust/with cargo; in Perl/with CPAN
                modules; in Go/with goroutines; in C#/on the .NET framework; in Scala/on Spark; in LaTeX/with a TeX
                macro""",
            ),
        },
    ),
    Family(
        ("paper", "report", "finding"),
        (
            "effect of {drug} on {disease} in {animal}",
            "{drug} for {disease}: a trial with {animal}",
            "does {drug} help {animal} with {disease}?",
            "{disease} in {animal} treated by {drug}",
        ),
        {
            "drug": (
                ("drug", "method", "material"),
                """aspirin/acetylsalicylic acid; insulin/a pancreatic hormone; penicillin/an early antibiotic; vitamin
                C/ascorbic acid; caffeine/strong coffee; alcohol/ethanol; morphine/an opiate; garlic/allicin; green
                tea/catechins; surgery/an operation; radiation/x-rays; acupuncture/needles; a vaccine/immunisation;
                exercise/physical training; fasting/a diet; cortisone/a steroid; iron/ferrous salts; zinc/zinc oxide;
                honey/bee products; laser light/a laser beam""",
            ),
            "disease": (
                ("disease", "symptom", "problem"),
                """headache/migraine; diabetes/high blood sugar; cancer/malignant tumours; obesity/overweight;
                depression/low mood; malaria/plasmodium infection; asthma/shortness of breath; burns/scalded skin;
                influenza/the flu; hair loss/alopecia; insomnia/lack of sleep; arthritis/swollen joints; deafness/loss
                of hearing; high blood pressure/hypertension; anaemia/lack of red cells; epilepsy/seizures;
                osteoporosis/brittle bones; tooth decay/caries; stroke/brain infarction; diarrhoea/loose bowels""",
            ),
            "animal": (
                ("animal", "species", "subject"),
                """mice/laboratory rodents; dogs/puppies; cats/kittens; horses/ponies; goats/kids of a goat;
                geese/goslings; donkeys/mules; frogs/tadpoles; cows/dairy cattle; pigs/piglets; chickens/laying hens;
                fish/salmon; monkeys/macaques; sheep/lambs; rabbits/hares; bees/bumblebees""",
            ),
        },
    ),
    Family(
        ("review", "film", "description"),
        (
            "a {genre} about {plot} {place}",
            "{place}: {plot}, told as a {genre}",
            "this {genre} deals with {plot} {place}",
            "I saw a {genre} {place} with {plot} in it",
        ),
        {
            "genre": (
                ("genre", "style", "category"),
                """comedy/funny film; horror film/scary movie; romance/love story; western/cowboy film;
                documentary/factual report; thriller/suspense film; musical/film full of songs; cartoon/animated film;
                crime film/detective story; war film/battle epic; fairy tale/fantasy film; science fiction film/film of
                the future; tragedy/very sad drama; silent film/film without sound; biography/film of a real life;
                disaster film/catastrophe movie""",
            ),
            "plot": (
                ("plot", "theme", "topic"),
                """a lost dog/a runaway puppy; a bank robbery/thieves in a vault; a divorce/parents who separate; a
                haunted doll/a toy with a ghost; a football team/players before the final; a stolen painting/a missing
                Rembrandt; twins/two identical sisters; a wedding/a bride and a groom; a shipwreck/a boat that sinks; a
                chess player/a grandmaster; a poisoned king/the murder of a monarch; a school class/pupils and their
                teacher; an old letter/a note found in the attic; a cooking contest/rival chefs; a prison break/convicts
                who dig a tunnel; a treasure map/buried gold; a robot/a machine that thinks; a drought/months without
                rain; an election/two candidates; a baby/a newborn child""",
            ),
            "place": (
                ("setting", "location", "place"),
                """in the desert/among sand dunes; on an island/on a small atoll; in outer space/aboard a space station;
                in the mountains/high in the Alps; in a big city/between skyscrapers; on a farm/among barns and cattle;
                in the jungle/deep in the rain forest; at the north pole/on the Arctic ice; under water/in a submarine;
                in a hospital/on a ward; in a castle/behind thick old walls; on a train/in a railway carriage; in a
                hotel/in room 12 of an inn; at sea/on the open ocean; in a village/in a tiny hamlet; in a cave/far
                below ground""",
            ),
        },
    ),
    Family(
        ("headline", "message", "bulletin"),
        (
            "{firm} {event} {reason}",
            "{reason}, {firm} {event}",
            "breaking: {firm} {event} {reason}",
            "why {firm} {event}: {reason}",
        ),
        {
            "firm": (
                ("organization", "industry", "company"),
                """a bank/a lender; an airline/a carrier with 80 planes; a car maker/an automobile plant; a hospital/a
                clinic; a university/a college; a newspaper/a daily paper; a football club/a team of the first league; a
                supermarket/a grocery chain; an oil company/a petrol giant; a museum/an art gallery; a railway/a train
                operator; a brewery/a beer maker; a software firm/a maker of apps; a theatre/an opera house; a zoo/a
                wildlife park; a shipyard/a builder of ships; a toy maker/a doll factory; a hotel chain/a holiday
                resort""",
            ),
            "event": (
                ("event", "action", "topic"),
                """closes its doors/shuts down; hires a thousand people/creates new jobs; raises its prices/becomes
                dearer; gets a new boss/names a chief executive; goes to court/sues a rival; wins an award/is honoured
                with a prize; moves to another city/leaves town; apologises/says sorry in public; is sold/changes its
                owner; burns down/is destroyed by fire; borrows money/takes a huge loan; opens a branch/inaugurates a
                second site; loses its data/suffers a leak; cuts pay/lowers wages""",
            ),
            "reason": (
                ("reason", "cause"),
                """after a strike/since workers walked out; because of the storm/due to the hurricane; after a
                scandal/as bribes were found out; because of a new law/since parliament voted; to please its
                customers/as clients had complained; after a record year/thanks to huge profits; because of a virus/as
                the epidemic spreads; for lack of staff/since nobody applied for the jobs; after a merger/since two
                groups joined; because of a mistake/due to an error in the books; to save energy/as power is scarce;
                after a bomb threat/since police gave a warning""",
            ),
        },
    ),
    Family(
        ("request", "command", "message"),
        (
            "{do} {thing}",
            "please {do} {thing}",
            "could you {do} {thing}?",
            "{do} {thing} now",
            "hey, {do} {thing} today",
            "i want you to {do} {thing}",
        ),
        {
            "do": (
                ("action",),
                """tell me about/show me/what is there to know about/check/look up/do I have anything on; set
                up/add/create/make a new entry for; delete/remove/clear/get rid of/take away;
                change/update/edit/correct/move/modify; start/turn on/open/switch on/launch/activate; stop/turn
                off/close/switch off/end/quit; send/forward/share/pass on; order/buy/pay for/get me; raise/turn
                up/give me more of; lower/turn down/reduce/give me less of; recommend/suggest/find me something good
                for; read out/read aloud/recite; save/keep/store/file; translate/say in french/put into german""",
            ),
            "thing": (
                ("subject", "domain", "topic"),
                """the alarm/my wake up call; the meeting/my appointment; the song/my playlist; the email/the message
                from tom; the shopping list/what I need from the grocer; the flight/my plane ticket; the pizza/my
                take-away; the forecast/the weather report; the lamp/the light in the kitchen; the headlines/the
                morning news; the bank transfer/my last payment; the photo/the picture of our dog; the recipe/how to
                bake bread; the taxi/my ride home; the heating/the thermostat; the podcast/the radio show; the stock
                price/my shares; the vacuum cleaner/the robot that sweeps; the timer/the countdown; the audiobook/the
                novel on my phone; the game/the quiz; the contact/the phone number of anna; the tweet/my profile
                picture; the traffic/the jam on the motorway""",
            ),
        },
    ),
    # Nobody's requests are all commands: actions asked for as questions and wishes, too.
    Family(
        ("request", "command", "question"),
        (
            "{do} {thing}",
            "{do} {thing} please",
            "{do} {thing} tomorrow",
            "hello, {do} {thing}",
            "ok now {do} {thing}",
        ),
        {
            "do": (
                ("action",),
                """what is with/how is/when is/where is/is there anything new about/do you know/let me see/i wonder
                about/any news of; prepare/do not let me miss/plan/schedule/write down; i no longer need/forget
                about/drop/erase/throw out/call off; i want another time for/replace/swap/postpone/rename/put
                off/make a change to/i meant something else by; begin/put on/run/play/resume/go on with;
                pause/mute/shut/no longer play/put an end to; let my friends know about/publish/pass round/tell
                my wife about; i will pay for/reserve/book/get hold of; make more of/a bit more
                of/increase/strengthen; not so much of/a bit less of/decrease/weaken; what is the best of/which is
                good for/give me an idea for/advise me on; how do i use/what is meant by/teach me about/how does one
                make""",
            ),
            "thing": (
                ("subject", "domain", "topic", "scenario"),
                """the alarm clock/the bell at six in the morning/my being woken/the ringing at seven; the calendar/the
                dentist on tuesday/the lunch with sarah/my birthday party; the music/the jazz station/the new
                album/some rock by that band; the mail/the letter from my boss/john's answer/the phone number of my
                aunt/uncle bob's address; eggs and milk on the list/my to do list/what is left to do; the train/the
                bus to town/the ticket to chicago/an uber/the jam on the road/the way home by car; the dinner from
                the thai place/a burger with fries/the chinese food/the roast/pasta with sauce; the rain/the
                temperature outside/how cold it gets/the storm; the bedroom lights/the brightness of the lamps/the
                dust in the hall/the espresso machine; what the papers say/the story of the election/the headlines of
                the day; the chess/the crossword/a round of cards; the novel/chapter four/the story that is read to
                me; the tweet/what i say on facebook/my status online; the euro/the exchange rate/dollars for
                pounds/my shares; the film/the cinema round the corner/tonight's movie; something funny/that pun/the
                one about the penguin""",
            ),
        },
    ),
    # How something is written, beside what it says.
    Family(
        ("message", "note", "comment"),
        (
            "{form} {tone} {matter}",
            "{form} {tone} {matter}.",
            "{form} {tone} {matter}!",
        ),
        {
            "tone": (
                ("tone", "mood", "attitude"),
                """may I respectfully mention that/I kindly draw your attention to the fact that; for heaven's sake/get
                it into your heads at last; hooray/what a joy; alas/I am in tears because; yo dude/hey mate no kidding;
                it is hereby certified that/pursuant to section four; perhaps/I am not sure but maybe; beyond any
                doubt/I swear that it is certain; once upon a time/long ago in a far-off kingdom; we interrupt the
                programme/breaking news; psst between you and me/do not tell anyone but; ha ha guess what/you will laugh
                but; dear diary/tonight I confess to these pages that; now children remember/as every pupil learns; wow
                omg/I cannot believe it; rumour has it that/people whisper that; with deepest sympathy/we mourn because;
                hurry hurry/there is no time to lose because""",
            ),
            "matter": (
                ("matter", "subject", "fact"),
                """the shop is closed/nobody sells anything there; the bus is late/the coach has not come yet; the milk
                is sour/the milk has gone bad; my sister is here/my sister has arrived; the lift is broken/the elevator
                does not work; it snows/there is snow outside; the king has a son/a prince was born; the window is
                open/somebody opened the window; the cake is ready/the cake is out of the oven; our team lost/the other
                side won; the river is rising/the water gets higher; the cat is gone/nobody can find the cat; rents go
                up/flats get dearer; a tooth hurts/I have toothache; the guests are asleep/all visitors went to bed; the
                bridge is painted/there is fresh paint on the bridge""",
            ),
            "form": (
                ("form", "format", "layout"),
                """- [ ]/[x]; ##/####; Q:/A:; 1)/2); <p>/<li>; >/>>; TODO/FIXME; $/~$; @all/@you; chapter
                one/chapter seven; 09:15/17:40; fig. 1/fig. 12; PS/PPS""",
            ),
        },
    ),
    Family(
        ("sentence", "line", "statement"),
        ("{person} {mood} {deed}", "{person} {mood} {deed}.", "{person} {mood} {deed} too"),
        {
            "person": (
                ("person", "speaker"),
                """I/I myself; we/all of us; you/you yourself; they/those people; my friends/the people I know; the
                children/our little ones; both lawyers/the two solicitors""",
            ),
            "mood": (
                ("mood", "attitude"),
                """will certainly/shall without fail; used to/in former days did; must/have no choice but to; might/may
                perhaps; never/at no time; would love to/would so like to; almost always/time and again; could
                not/failed to; refuse to/will on no account; do not have to/need not""",
            ),
            "deed": (
                ("action", "event", "content"),
                """mend the bicycle/repair the bike; sing in the choir/join in the singing; sell the boat/find a buyer
                for the boat; cross the border/go to the other country; plant an oak/put a tree in the ground; tell the
                truth/say how it really is; climb the hill/walk up to the top; eat oysters/have seafood; count the
                votes/add up the ballots; carry the piano/move the heavy instrument; learn Greek/take lessons in Greek;
                sleep late/stay in bed until noon; call the police/dial the emergency number; leave the party/go home
                early""",
            ),
        },
    ),
    Family(
        ("question", "query", "line"),
        ("{style} {content}", "{style} {content}?", "well now, {style} {content}", "{style} {content}, I wonder"),
        {
            "style": (
                ("style", "attitude"),
                """would you perhaps be so kind as to say/excuse me, could you possibly tell me; hey buddy, any
                idea/yo, d'you happen to know; answer me right now,/quick, out with it,; pray, good sir, say/prithee,
                tell; the applicant shall state/it is to be specified on page two; little bunny, can you guess/who of
                my small ones can say; oh dear, oh dear, does nobody know/I am so frightened, please say; must I really
                ask/as if anyone here had ever known; this study examines/the present paper investigates; tonight at
                nine we reveal/our reporters found out; um, so, like, hm,/er, you know, well,; ladies and gentlemen,
                guess/roll up, roll up and hear; according to the manual, check/step one of the procedure is to look
                up; I dreamt of the moon and asked her/whisper to me, o wind,""",
            ),
            "content": (
                ("content", "subject", "matter"),
                """where the station is/which way leads to the trains; when the shop opens/from what hour one can buy
                things; who wrote the letter/whose handwriting that is; why the soup is cold/for what reason nobody
                heated the soup; how old the tree is/how many years the oak has stood; what the ring costs/the price of
                the ring; whose dog barks/which hound makes the noise; how deep the lake is/the depth of the water; why
                the lamp went out/what happened to the light; who won the race/which runner came in first; when the
                ship sails/at what time the boat leaves; how the trick works/the secret of the magician; what the
                doctor said/the opinion of the physician; where the keys are/in which place the keys lie""",
            ),
        },
    ),
    Family(
        ("message", "statement", "post"),
        ("{content}, {style}", "{content}, {style}.", "and so {content}, {style}!", "{content} ... {style}"),
        {
            "style": (
                ("style", "tone"),
                """if I may humbly add/with the greatest respect; lol/haha rofl; amen/so help us God; end of
                message/over and out; as was to be shown/which completes the proof; or else/and I will not say it
                twice; my sweet angel/honeybunch; subject to clause four/without prejudice to the contract; and they
                lived happily ever after/said the little mouse; dude/bro; alas, alack/woe betide us; at least so they
                say/if the gossips are right; terms and conditions apply/while stocks last; more after the
                weather/reported from the scene by our correspondent""",
            ),
            "content": (
                ("content", "event", "topic"),
                """we sold the house/the house has a new owner; the train was late/the express came an hour after its
                time; the roses bloom/there are flowers on the rose bush; the judge resigned/a magistrate left office;
                my tooth is out/the dentist pulled my tooth; the bank was robbed/thieves emptied the bank; our baby
                walks/the child took a first step; it rained all day/the rain did not stop; the bread burned/the loaf
                turned black; the factory closed/the works shut down; he learned to swim/he can swim now; the concert
                was sold out/no ticket was left for the concert; she moved to Rome/she lives in Rome now; the phone is
                dead/the battery of the phone is empty""",
            ),
        },
    ),
    Family(
        ("letter", "message", "email"),
        ("{style}, {content}", "{style}: {content}.", "{style}! {content}", "{style},\n{content}"),
        {
            "style": (
                ("style", "audience"),
                """Dear Sir or Madam/To whom it may concern; hi guys/hey all; my beloved/dearest heart; Your
                Majesty/may it please Your Excellency; comrades/brothers and sisters in the struggle; attention all
                units/to all staff; dear boys and girls/hello kids; ticket 998/reference number 4711; O Muse/hearken,
                ye heavens; valued customer/dear shopper; you scoundrel/listen, you rascal; fellow scientists/esteemed
                colleagues of the academy""",
            ),
            "content": (
                ("content", "fact", "purpose"),
                """I have moved to Leeds/my new address is in Leeds; the meeting is on Friday/we meet at the end of the
                week; your order has been sent/the goods are on their way; I need more time/the deadline is too soon
                for me; we lost the key/the key cannot be found; the roof leaks/water comes through the roof; my son
                is ill/my boy has a fever; thanks for the flowers/the bouquet was lovely; the price has
                doubled/it costs twice as much now; I quit my job/I am leaving the firm; the garden party is off/there
                will be no garden party; the parcel came broken/what was in the parcel is in pieces; a vote will be
                held/all are to cast their votes; the wine has arrived/twelve bottles of wine are here""",
            ),
        },
    ),
)
